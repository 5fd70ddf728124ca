//! Descriptors that callers pass as numbers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

/// Duplicates the descriptor `number`; the copy is closed on exec. Fails with `EBADF` if it is not open.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only passed to fcntl, which says EBADF for a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned()
}

/// Moves descriptors to the given numbers, where they stay open on exec. A descriptor that has one of the numbers is closed.
///
/// # Safety
///
/// No other owner of a descriptor with one of the numbers uses or closes it afterwards.
pub unsafe fn move_to(fds: Vec<OwnedFd>, numbers: &[RawFd]) -> io::Result<()> {
    let mut moved = Vec::with_capacity(fds.len());
    for mut fd in fds {
        while numbers.contains(&fd.as_raw_fd()) {
            let copy = fd.try_clone()?;
            // Stays open until another descriptor gets its number.
            let _ = std::mem::replace(&mut fd, copy).into_raw_fd();
        }
        moved.push(fd);
    }
    for (fd, number) in moved.iter().zip(numbers) {
        // SAFETY: the caller gives up all other owners of the number, and no moved descriptor has it.
        if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn descriptors_are_moved_to_numbers_that_they_exchange() {
        let file = |text: &str| {
            let fd = rustix::fs::memfd_create(c"ferro-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
            let mut file = std::fs::File::from(fd);
            file.write_all(text.as_bytes()).expect("written");
            OwnedFd::from(file)
        };
        let fds: Vec<OwnedFd> = ["a", "b", "c"].into_iter().map(file).collect();
        let free = duplicate(fds[2].as_raw_fd()).expect("duplicated").into_raw_fd();
        let numbers = [fds[1].as_raw_fd(), fds[0].as_raw_fd(), free];
        // SAFETY: the descriptors with these numbers are the moved ones and `free`, which has no owner.
        unsafe { move_to(fds, &numbers) }.expect("moved");
        let texts = numbers.map(|number| {
            let mut copy = std::fs::File::from(duplicate(number).expect("open"));
            let flags = rustix::io::fcntl_getfd(&copy).expect("flags");
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "only the copy is closed on exec");
            let mut text = String::new();
            copy.rewind().expect("rewound");
            copy.read_to_string(&mut text).expect("read");
            text
        });
        assert_eq!(texts, ["a", "b", "c"]);
    }
}
