//! Descriptors that arrive as numbers.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// Our own copy of the descriptor with this number, closed on exec. `EBADF` if there is none.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only passed to fcntl, which says EBADF for a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned()
}
