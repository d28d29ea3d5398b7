//! The signal by which a limit on the length of files (`ulimit -f`, `LimitFSIZE=`) ends a process. Failing operations
//! are told as any other, by whoever asked for them.

use std::io;

/// From now on an operation that would make a file longer than this process may fails with `EFBIG`
/// ([`crate::ErrorKind::NoSpace`]), instead of ending the process by `SIGXFSZ`. For programs, first of all; what they
/// run finds the signal as it was.
///
/// # Errors
/// What the kernel says.
pub fn survive_size_limit() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // Ignored, it would be so in children, too; a handler is gone with the program that they begin with.
    //
    // SAFETY: all zeros are a `sigaction` without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: `action` is a whole `sigaction` that outlives the call, and a handler that does nothing may run at any
    // moment on any thread.
    let done = unsafe { libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
