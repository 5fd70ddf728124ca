//! A fork whose child has the caller's *parent* as its parent.
//!
//! A zygote forks workers that the agent must reap, and only a parent can reap. `CLONE_PARENT` makes the zygote and its children siblings.
//! glibc's `fork(3)` cannot pass this flag, so this module makes the system call and repeats the steps of `fork(3)` in a process with one
//! thread: the cached thread id and the list of robust mutexes. Handlers of `pthread_atfork(3)` do not run.

use std::ffi::{c_int, c_long, c_void};
use std::io;

/// The two returns of [`fork_sibling`].
#[derive(Debug)]
pub enum Forked {
    /// In the child.
    Child,
    /// In the calling process.
    Caller {
        /// Process id of the child.
        pid: i32,
    },
}

/// `PR_GET_TID_ADDRESS`, for which libc has no constant.
const PR_GET_TID_ADDRESS: c_int = 40;

/// The address at which glibc caches the id of the calling thread.
///
/// Fails if no address is known whose value is the thread's id.
fn cached_thread_id() -> io::Result<*mut c_int> {
    let address = match described_thread_id() {
        Some(address) => address,
        None => registered_thread_id()?,
    };
    // SAFETY: the C library gave the address: it is in the descriptor of this thread, which lives.
    if address.is_null() || unsafe { *address != libc::gettid() } {
        let reason = "the C library does not tell where it keeps the id of a thread";
        return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
    }
    Ok(address)
}

/// The address of the cached id by the description of a thread that glibc exports for debuggers; `None` without it (before glibc 2.34).
fn described_thread_id() -> Option<*mut c_int> {
    /// `DB_DEFINE_FIELD` of `nptl_db`.
    #[repr(C)]
    struct Field {
        bits: u32,
        elements: u32,
        offset: u32,
    }

    // SAFETY: the name ends with NUL.
    let field = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_thread_db_pthread_tid".as_ptr()) }.cast::<Field>();
    // SAFETY: glibc exports a constant of this type by this name.
    let field = unsafe { field.as_ref() }?;
    if (field.bits, field.elements) != (c_int::BITS, 1) {
        return None;
    }
    // SAFETY: the function always succeeds. In glibc its result is the address of the thread's descriptor.
    let descriptor = unsafe { libc::pthread_self() } as *mut c_int;
    Some(descriptor.wrapping_byte_add(field.offset as usize))
}

/// The address that the kernel clears when the calling thread ends. With glibc 2.36 it is the address of the cached id, with glibc 2.43
/// another one in a process that has not been forked.
///
/// Fails without `CONFIG_CHECKPOINT_RESTORE` (Linux 3.5).
fn registered_thread_id() -> io::Result<*mut c_int> {
    let mut address: *mut c_int = std::ptr::null_mut();
    // SAFETY: the kernel writes a pointer to `address`.
    if unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut address) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(address)
}

/// The head of the list of robust mutexes of the calling thread, and its size.
fn robust_list() -> io::Result<(*mut c_void, usize)> {
    let (mut head, mut length): (*mut c_void, usize) = (std::ptr::null_mut(), 0);
    // SAFETY: the kernel writes a pointer and a length.
    if unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((head, length))
}

/// Forks. The child is a child of this process's parent, whose thread that started this process receives its death signals.
///
/// Fails with `ResourceBusy` if this process has other threads, because the child would inherit their locks.
pub fn fork_sibling() -> io::Result<Forked> {
    if !super::threads::is_single()? {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    let thread_id = cached_thread_id()?;
    let (robust_head, robust_length) = robust_list()?;
    // SAFETY: all output streams. The child would write their buffers a second time.
    unsafe { libc::fflush(std::ptr::null_mut()) };
    // The signal is ignored: the child has the exit signal of this process.
    let flags = libc::CLONE_PARENT | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
    // SAFETY: there is one thread and the child gets a copy of the memory, so both may continue as after `fork(3)`. The kernel stores the
    // child's id at `thread_id` in the child only.
    let pid = unsafe { clone(flags, thread_id) };
    match pid {
        ..0 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: the values of the parent, which are addresses in this copy of its memory.
            unsafe { libc::syscall(libc::SYS_set_robust_list, robust_head, robust_length) };
            Ok(Forked::Child)
        }
        _ => Ok(Forked::Caller { pid: i32::try_from(pid).unwrap_or(-1) }),
    }
}

/// `clone(2)` on the caller's stack. The order of the last two arguments depends on the architecture.
///
/// # Safety
///
/// As for the system call.
unsafe fn clone(flags: c_int, thread_id: *mut c_int) -> c_long {
    let (no_stack, no_parent_id) = (std::ptr::null_mut::<c_void>(), std::ptr::null_mut::<c_int>());
    let no_tls = std::ptr::null_mut::<c_void>();
    // SAFETY: by the caller's contract.
    unsafe {
        if cfg!(target_arch = "x86_64") {
            libc::syscall(libc::SYS_clone, c_long::from(flags), no_stack, no_parent_id, thread_id, no_tls)
        } else {
            libc::syscall(libc::SYS_clone, c_long::from(flags), no_stack, no_parent_id, no_tls, thread_id)
        }
    }
}
