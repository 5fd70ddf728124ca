//! Safe wrappers over the kernel: the only place for `unsafe` and raw system calls.

pub mod beats;
pub mod cgroup;
pub mod channel;
pub mod clock;
pub mod console;
pub mod fd;
pub mod fifo;
pub mod fork;
pub mod guard;
pub mod lease;
pub mod leftovers;
pub mod net;
pub mod notify;
mod pidfd;
pub mod poller;
pub mod probe;
pub mod process;
pub mod procfs;
pub mod resolve;
pub mod sigmask;
pub mod spawn;
pub mod threads;
pub mod timer;
pub mod title;
pub mod usage;
pub mod wait;
pub mod wake;
