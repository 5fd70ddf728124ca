//! The thread that keeps log files within their limits (`ferro-rotate`). It may wait for a disk.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::log_file::RotatedFile;
use super::rotation::{FileRotation, RotationLimits};
use crate::error::{Error, Result};
use crate::sys::poller::wait_readable;
use crate::thread::{Inbox, NativeThread, Service, ThreadOrder};

/// Time between two checks of the sizes.
const INTERVAL: Duration = Duration::from_millis(200);

/// An order to the thread.
pub(crate) enum RotationOrder {
    Close,
}

impl ThreadOrder for RotationOrder {
    fn close() -> Self {
        Self::Close
    }
}

/// Starts the thread. `warn` gets the first error of each file.
pub(crate) fn start_rotation(
    files: Vec<(PathBuf, Arc<RotatedFile>)>,
    limits: RotationLimits,
    warn: impl Fn(String) + Send + 'static,
) -> Result<NativeThread<RotationOrder>> {
    let files = files.into_iter().map(|(path, rotated)| FileRotation::new(path, rotated, limits));
    let files = files.map(|file| WatchedFile { file, has_warned: false }).collect();
    NativeThread::start("ferro-rotate", |inbox| Ok(RotationService { inbox, files, warn: Box::new(warn) }))
}

struct WatchedFile {
    file: FileRotation,
    has_warned: bool,
}

struct RotationService {
    inbox: Inbox<RotationOrder>,
    files: Vec<WatchedFile>,
    warn: Box<dyn Fn(String) + Send>,
}

impl Service for RotationService {
    type Order = RotationOrder;

    fn serve(&mut self) -> Result<()> {
        loop {
            for WatchedFile { file, has_warned } in &mut self.files {
                if let Err((step, error)) = file.rotate()
                    && !std::mem::replace(has_warned, true)
                {
                    (self.warn)(format!(
                        "failed to {step} the log file {}, which is larger than its limit: {error}; the job goes on, and so does the log",
                        file.path().display()
                    ));
                }
            }
            wait_readable([Some(self.inbox.wake() as &dyn AsFd)], Some(INTERVAL))
                .map_err(|source| Error::os("wait for", "orders to rotate log files", source))?;
            self.inbox.wake().drain();
            if let Some(RotationOrder::Close) = self.inbox.next() {
                return Ok(());
            }
        }
    }

    fn finish(&mut self, _outcome: &Result<()>) {}
}
