//! userfaultfd(2) in asynchronous write-protect mode (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::c_ulong =
    nix::request_code_readwrite!(0xaa, 0x00, size_of::<Register>());
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;

/// The flag of userfaultfd(2) that unprivileged callers must give (Linux 5.11); it does not matter to asynchronous
/// write-protection.
pub const USER_MODE_ONLY: i32 = 1;

/// A userfaultfd of some address space, which need not be the caller's.
#[derive(Debug)]
pub struct WriteTracker {
    fd: OwnedFd,
}

impl WriteTracker {
    /// Takes over a descriptor fresh from userfaultfd(2) and enables asynchronous write-protection on it.
    pub fn enable(fd: OwnedFd) -> Result<Self, Errno> {
        let mut api = Api {
            api: UFFD_API,
            features: FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: `api` is the kernel's struct uffdio_api and outlives the call.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Self { fd })
    }

    /// Registers a range for tracking; nothing is armed yet. `EBUSY`: another userfaultfd has it; `EINVAL`: a
    /// mapping in it cannot be tracked (vDSO, device memory).
    pub fn register(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut register = Register {
            start,
            len,
            mode: MODE_WP,
            ioctls: 0,
        };
        // SAFETY: `register` is the kernel's struct uffdio_register and outlives the call.
        Errno::result(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register)
        })
        .map(drop)
    }
}
