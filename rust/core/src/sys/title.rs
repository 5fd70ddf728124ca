//! The command line and the environment that `/proc` shows for this process, and its name.

use std::ffi::{CStr, CString, c_ulong};
use std::io;

use super::procfs;

/// Changes the name of the calling thread (`PR_SET_NAME`); the kernel keeps 15 bytes.
pub fn set_name(name: &CStr) {
    // SAFETY: the kernel reads a string that ends in NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Makes `/proc/PID/cmdline` and `/proc/PID/environ` show these strings, as after an `execve` with them (`PR_SET_MM_MAP`). The strings are
/// never freed.
///
/// Fails without `CONFIG_CHECKPOINT_RESTORE` (Linux 3.18).
pub fn set_command_line(argv: &[CString], env: &[CString]) -> io::Result<()> {
    let bytes = |strings: &[CString]| strings.iter().map(|string| string.as_bytes_with_nul().len()).sum::<usize>();
    let (argv_bytes, env_bytes) = (bytes(argv), bytes(env));
    let mut area = Vec::with_capacity(argv_bytes + env_bytes);
    argv.iter().chain(env).for_each(|string| area.extend_from_slice(string.as_bytes_with_nul()));
    let area: &'static [u8] = area.leak();
    let start = area.as_ptr().addr() as u64;
    let [code_start, code_end, stack_start, data_start, data_end, brk_start] =
        procfs::own_layout().ok_or(io::ErrorKind::InvalidData)?;
    let (argv_end, env_end) = (start + argv_bytes as u64, start + (argv_bytes + env_bytes) as u64);
    let map = MemoryMap {
        code_start,
        code_end,
        data_start,
        data_end,
        brk_start,
        // SAFETY: an increment of 0 changes nothing.
        brk: unsafe { libc::sbrk(0) }.addr() as u64,
        stack_start,
        argv_start: start,
        argv_end,
        env_start: argv_end,
        env_end,
        auxv: std::ptr::null(),
        auxv_bytes: 0,
        executable: u32::MAX, // unchanged
    };
    // SAFETY: the kernel reads the structure and checks its addresses. The area is never freed.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_MM,
            libc::PR_SET_MM_MAP as c_ulong,
            &raw const map,
            size_of::<MemoryMap>() as c_ulong,
            0 as c_ulong,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct prctl_mm_map` of the kernel.
#[repr(C)]
struct MemoryMap {
    code_start: u64,
    code_end: u64,
    data_start: u64,
    data_end: u64,
    brk_start: u64,
    brk: u64,
    stack_start: u64,
    argv_start: u64,
    argv_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: *const u64,
    auxv_bytes: u32,
    executable: u32,
}
