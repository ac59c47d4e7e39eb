//! Sharing blocks between files (ioctl_ficlonerange(2)).

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    length: u64,
    target_offset: u64,
}

const _: () = assert!(size_of::<CloneRange>() == 32);

nix::ioctl_write_ptr!(
    /// `FICLONERANGE`.
    ficlonerange,
    0x94,
    13,
    CloneRange
);

/// Has `target` share the blocks of a range of `source`. Offsets are multiples of the block size; so is the length, unless the
/// range ends where `source` does and `target` ends there too.
///
/// # Errors
///
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL`, `ENOTTY`: not with these files.
pub fn share(
    source: BorrowedFd<'_>,
    source_offset: u64,
    length: u64,
    target: BorrowedFd<'_>,
    target_offset: u64,
) -> Result<(), Errno> {
    let range = CloneRange {
        source: i64::from(source.as_raw_fd()),
        source_offset,
        length,
        target_offset,
    };
    // SAFETY: the kernel reads the structure, which outlives the call; both descriptors are open.
    unsafe { ficlonerange(target.as_raw_fd(), &range) }.map(drop)
}
