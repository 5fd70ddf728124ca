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

/// Closes the file of a descriptor that others still own: the number stays open on `/dev/null`.
pub fn discard(fd: &OwnedFd) -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    // SAFETY: takes integers. The number belongs to `fd` and stays open.
    if unsafe { libc::dup3(null.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a descriptor has this number.
fn is_open(number: RawFd) -> bool {
    // SAFETY: takes integers.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Moves descriptors to the given numbers, where they stay open on exec. The standard streams are replaced; any other number must be free or
/// that of a moved descriptor, else this fails with `EBUSY`.
pub fn move_to(fds: Vec<OwnedFd>, numbers: &[RawFd]) -> io::Result<()> {
    let own: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    if numbers.iter().any(|number| *number > libc::STDERR_FILENO && !own.contains(number) && is_open(*number)) {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
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
        // SAFETY: the number is that of a standard stream, was free, or belonged to a descriptor that has another one now.
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
    fn a_descriptor_of_another_owner_is_not_replaced() {
        let other = rustix::fs::memfd_create(c"ferro-other", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        let moved = other.try_clone().expect("duplicated");
        let error = move_to(vec![moved], &[other.as_raw_fd()]).expect_err("in use");
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    }

    #[test]
    fn a_discarded_pipe_has_no_writer() {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        discard(&writer).expect("discarded");
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
        assert_eq!(rustix::io::write(&writer, b"unread"), Ok(6));
    }

    #[test]
    fn descriptors_are_moved_to_numbers_that_they_exchange() {
        let file = |text: &str| {
            let fd = rustix::fs::memfd_create(c"ferro-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
            let mut file = std::fs::File::from(fd);
            file.write_all(text.as_bytes()).expect("written");
            OwnedFd::from(file)
        };
        let fds: Vec<OwnedFd> = ["a", "b", "c"].into_iter().map(file).collect();
        let free = (900..1000).rev().find(|number| !is_open(*number)).expect("a free number");
        let numbers = [fds[1].as_raw_fd(), fds[0].as_raw_fd(), free];
        move_to(fds, &numbers).expect("moved");
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
