//! The membership of one agent in a rendezvous: its handle, and the thread that is connected to the host.
//!
//! The decisions are in [`crate::rendezvous::member`].

mod client;
mod thread;
mod view;

pub use client::RendezvousClient;
