//! Session keyrings: keyctl(2), session-keyring(7).
#![allow(unsafe_code)]

use std::ffi::CStr;

use nix::errno::Errno;

/// Makes `name` the calling process's session keyring, creating it if there is none, so that its children don't
/// possess the keys of whoever started it. That the kernel has no keyrings is no error.
pub fn join_session(name: &CStr) -> Result<(), Errno> {
    // SAFETY: the kernel reads a string that ends in NUL and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            name.as_ptr(),
        )
    };
    match Errno::result(result) {
        Err(Errno::ENOSYS) | Ok(_) => Ok(()),
        Err(error) => Err(error),
    }
}
