//! Anonymous memory files (`memfd_create(2)`), mapped.
//!
//! A leaf: it imports nothing of the crate, so that [`crate::record`], which lies below the rest of this room, may
//! build its buffer chain on it.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use memmap2::{MmapMut, MmapOptions};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};

/// Maps `len` bytes of a new memory file, zero-filled, shared and writable.
///
/// The file is sealed against every change of its size and its only descriptor is closed before this returns: the
/// mapping is all that is left of it, and dropping the mapping frees it. No page is allocated before it is touched, so
/// `len` costs address space only. `name` is what `/proc/PID/maps` shows after `/memfd:`.
///
/// # Errors
///
/// What `memfd_create(2)`, `ftruncate(2)`, `fcntl(2)` with `F_ADD_SEALS` and `mmap(2)` report.
pub fn map_memory_file(name: &CStr, len: usize) -> io::Result<MmapMut> {
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(len as u64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    // SAFETY: the file was made here and its descriptor is dropped below without having been shared, so nobody else
    // can write to it; it is sealed, so it cannot shrink under the mapping (no SIGBUS).
    let map = unsafe { MmapOptions::new().len(len).map_mut(&file)? };
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_zero_and_writable() {
        let mut map = map_memory_file(c"snapback-test", 8192).unwrap();
        assert!(map.iter().all(|&byte| byte == 0));
        map[8191] = 7;
        assert_eq!(map[8191], 7);
    }

    #[test]
    fn an_impossible_length_is_an_error() {
        assert!(map_memory_file(c"snapback-test", usize::MAX / 2).is_err());
    }

    #[test]
    fn a_huge_length_costs_no_memory() {
        let map = map_memory_file(c"snapback-test", 1 << 36).unwrap();
        assert_eq!(map.len(), 1 << 36);
    }
}
