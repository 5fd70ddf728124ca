//! Notifications about growing files: `inotify(7)`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::inotify;

/// An inotify instance that reports modified files.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// Creates an instance. Fails with `EMFILE` if the user's limit (`max_user_instances`) is reached.
    pub fn new() -> io::Result<Self> {
        Ok(Self(inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?))
    }

    /// Starts to watch a file and returns the number of the watch. Watching a file again returns the same number.
    pub fn watch(&self, path: &Path) -> io::Result<i32> {
        Ok(inotify::add_watch(&self.0, path, inotify::WatchFlags::MODIFY)?)
    }

    /// Ends a watch.
    pub fn unwatch(&self, watch: i32) {
        // Fails only if the kernel has already removed the watch together with its file.
        let _ = inotify::remove_watch(&self.0, watch);
    }

    /// Calls `modified` for each watch reported since the last call. `false` means that reports were lost: check every file.
    pub fn drain(&self, mut modified: impl FnMut(i32)) -> bool {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 8192];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut complete = true;
        while let Ok(event) = reader.next() {
            if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                complete = false;
            } else {
                modified(event.wd());
            }
        }
        complete
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
