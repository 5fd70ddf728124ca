//! The handle of the size limits of log files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::warnings::Warnings;
use crate::error::Result;
use crate::logs::{RotatedFile, RotationLimits, RotationOrder, TeeThread, start_rotation};
use crate::thread::{CloseOutcome, NativeThread};

/// Keeps log files within their limits until it is closed or dropped.
#[derive(Debug)]
pub struct LogRotation {
    readers: Arc<TeeThread>,
    thread: NativeThread<RotationOrder>,
    files: Vec<PathBuf>,
}

impl LogRotation {
    pub(super) fn open(
        readers: &Arc<TeeThread>,
        files: Vec<PathBuf>,
        limits: RotationLimits,
        warnings: &Warnings,
    ) -> Result<Self> {
        let rotated = files.iter().map(|path| (path.clone(), Arc::<RotatedFile>::default()));
        let rotated: Vec<_> = rotated.collect();
        let warnings = warnings.clone();
        // The readers are told first: a tail that is opened later follows the file while it is rotated.
        readers.rotate(rotated.clone())?;
        let thread = start_rotation(rotated, limits, move |text| warnings.add(text))?;
        Ok(Self { readers: Arc::clone(readers), thread, files })
    }

    /// Ends the rotation. `false` if it has not ended within `timeout`, for instance because a disk does not respond. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        Ok(match self.thread.close(RotationOrder::Close, Some(timeout))? {
            CloseOutcome::Ended(outcome) => {
                outcome?;
                true
            }
            CloseOutcome::TimedOut => false,
        })
    }
}

impl Drop for LogRotation {
    fn drop(&mut self) {
        self.readers.end_rotation(std::mem::take(&mut self.files));
    }
}
