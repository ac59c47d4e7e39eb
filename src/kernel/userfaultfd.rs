//! userfaultfd(2) in asynchronous write-protect mode (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7), and to put pages where there are none.
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

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::c_ulong =
    nix::request_code_readwrite!(0xaa, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::c_ulong = nix::request_code_read!(0xaa, 0x01, size_of::<Range>());
const UFFDIO_COPY: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x03, size_of::<Copy>());
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_MISSING: u64 = 1 << 0;
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
        self.register_for(MODE_WP, start, len)
    }

    /// Registers a range of private anonymous memory for [`WriteTracker::put`] too. Whoever touches a page of it that is not
    /// there waits until [`WriteTracker::close`].
    pub fn open(&self, start: u64, len: u64) -> Result<(), Errno> {
        self.register_for(MODE_MISSING | MODE_WP, start, len)
    }

    /// Ends that, and whatever was armed in the range; it is registered for tracking then.
    pub fn close(&self, start: u64, len: u64) -> Result<(), Errno> {
        // To register it without a mode that it has would change nothing.
        let mut range = Range { start, len };
        // SAFETY: `range` is the kernel's struct uffdio_range and outlives the call.
        Errno::result(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range)
        })?;
        self.register(start, len)
    }

    /// Puts pages, whole ones, into an open range, up to the first that is there already. Returns how many bytes it has put.
    /// The kernel takes new pages for them without clearing them first, which makes it twice as fast as writing.
    pub fn put(&self, start: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let mut copy = Copy {
                to: start + done as u64,
                from: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: `copy` is the kernel's struct uffdio_copy and outlives the call; the kernel reads from `rest` and
            // writes to another address space.
            let put = Errno::result(unsafe {
                libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy)
            });
            done += usize::try_from(copy.copied).unwrap_or(0);
            match put {
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(Errno::EEXIST) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    fn register_for(&self, mode: u64, start: u64, len: u64) -> Result<(), Errno> {
        let mut register = Register {
            start,
            len,
            mode,
            ioctls: 0,
        };
        // SAFETY: `register` is the kernel's struct uffdio_register and outlives the call.
        Errno::result(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register)
        })
        .map(drop)
    }
}
