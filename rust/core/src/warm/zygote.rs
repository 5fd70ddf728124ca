//! The calls of a zygote and of its children. The interpreter makes them; this module does not know it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::process::Pid;
use rustix::thread::CpuSet;

use super::imported::ImportedFiles;
use super::wire::{MAX_BYTES, Release, Report, fork_count};
use crate::sys::channel::Channel;
use crate::sys::fork::Forked;
use crate::sys::leftovers::WARM_NAME;
use crate::sys::{fd, spawn, title};

const MAX_REASON_CHARS: usize = 1000;

/// The zygote's end of its channel to the agent.
#[derive(Debug)]
pub struct Zygote {
    channel: Channel,
    agent: Option<Pid>,
    /// In a child: brings a message when the zygote has reported the child, or ends with the zygote.
    reported: Option<Channel>,
}

impl Zygote {
    /// Takes the channel from standard input, which then reads from `/dev/null`, and names the process.
    pub fn start() -> io::Result<Self> {
        // Above the standard streams, which a child replaces.
        let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
        rustix::stdio::dup2_stdin(&null)?;
        title::set_name(WARM_NAME);
        Ok(Self { channel: Channel::from(channel), agent: rustix::process::getppid(), reported: None })
    }

    /// The next message of the agent; `None` when it has closed the channel or has ended.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; MAX_BYTES];
        loop {
            match self.channel.receive(&mut buffer, true) {
                Ok((0, _)) => return Ok(None),
                Ok((length, _)) => {
                    buffer.truncate(length);
                    return Ok(Some(buffer));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The number of children in the agent's next order; `None` as in [`Zygote::receive`].
    pub fn next_order(&self) -> io::Result<Option<u32>> {
        self.receive()?.map(|order| fork_count(&order).ok_or(io::ErrorKind::InvalidData.into())).transpose()
    }

    /// Reports that the process can be forked.
    pub fn report_ready(&self, imported: &ImportedFiles) -> io::Result<()> {
        title::set_name(WARM_NAME); // an import may have changed it
        self.channel.send_blocking(&Report::Ready.encode(), &[imported.as_fd()])
    }

    /// Reports that the process cannot be used.
    pub fn report_refusal(&self, reason: &str) -> io::Result<()> {
        self.channel.send_blocking(&Report::Refused(shortened(reason)).encode(), &[])
    }

    /// Reports that no further child can be forked now.
    pub fn report_shortage(&self, reason: &str) -> io::Result<()> {
        self.channel.send_blocking(&Report::Shortage(reason.to_owned()).encode(), &[])
    }

    /// Forks with `fork`, and reports the child.
    pub fn fork(&mut self, fork: impl FnOnce() -> io::Result<Forked>) -> io::Result<Forked> {
        let (own_end, child_end) = Channel::pair()?;
        let forked = fork()?;
        match forked {
            Forked::Child => self.reported = Some(child_end),
            Forked::Caller { pid } => {
                self.channel.send_blocking(&Report::Forked { pid }.encode(), &[])?;
                // The child may have ended.
                let _ = own_end.send(&[1], &[]);
            }
        }
        Ok(forked)
    }

    /// In a child: waits until the zygote has reported it. Then it leads a session and a process group of its own, and is killed with the
    /// agent. Fails if the zygote has ended before the report, or if a signal with a handler interrupts the wait.
    pub fn separate(&mut self) -> io::Result<()> {
        // The agent searches unreported children in the zygote's session only.
        let reported = self.reported.take().ok_or(io::ErrorKind::InvalidInput)?;
        if reported.receive(&mut [0; 1], true)?.0 == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        rustix::process::setsid()?;
        spawn::arm_parent_death_signal(libc::SIGKILL)?;
        // The agent may have ended before the signal was armed.
        if rustix::process::getppid() != self.agent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    /// In a child: reports it, waits for the agent's release and applies it: descriptors, limits, CPUs, working directory, name. `None` if
    /// the agent has closed the pool or has ended. Fails if a signal with a handler interrupts the wait.
    pub fn park(self) -> io::Result<Option<Release>> {
        let (own_end, agent_end) = Channel::pair()?;
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        self.channel.send_blocking(&Report::Parked { pid }.encode(), &[agent_end.as_fd()])?;
        drop(agent_end);
        let mut buffer = vec![0; MAX_BYTES];
        let (length, fds) = own_end.receive(&mut buffer, true)?;
        if length == 0 {
            return Ok(None);
        }
        let release = Release::decode(&buffer[..length]).ok_or(io::ErrorKind::InvalidData)?;
        // The worker does not keep the channels, and their numbers may be those of its descriptors.
        drop((self, own_end));
        apply(&release, fds)?;
        Ok(Some(release))
    }
}

/// At most the first [`MAX_REASON_CHARS`] of a reason, which may contain the text of any exception.
fn shortened(reason: &str) -> String {
    reason.chars().take(MAX_REASON_CHARS).collect()
}

fn apply(release: &Release, fds: Vec<OwnedFd>) -> io::Result<()> {
    let numbers: Vec<RawFd> = (0..3).chain(release.fds.iter().copied()).collect();
    if fds.len() != numbers.len() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    fd::move_to(fds, &numbers)?;
    if let Some(limit) = release.open_files {
        spawn::limit_open_files(limit)?;
    }
    if !release.cpus.is_empty() {
        let mut set = CpuSet::new();
        for cpu in &release.cpus {
            if *cpu >= CpuSet::MAX_CPU {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            set.set(*cpu);
        }
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    if let Some(cwd) = &release.cwd {
        rustix::process::chdir(cwd)?;
    }
    title::set_name(&name_of(&release.argv[0]));
    // Only the display is wrong without this.
    let _ = title::set_command_line(&release.argv, &release.env);
    Ok(())
}

/// The name that `execve` gives a process: the last part of the program's path.
fn name_of(program: &CString) -> CString {
    let name = program.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    CString::new(name).unwrap_or_default()
}
