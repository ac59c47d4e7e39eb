//! The keeper's view of a window: a shared mapping of a memfd that a target has mapped too.
#![allow(unsafe_code)]

use std::os::fd::AsFd;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::runner::LIVENESS_OFFSET;

/// A shared mapping. Bytes are copied in and out, never borrowed: the target may change its writable part whenever
/// it runs.
#[derive(Debug)]
pub struct Window {
    map: MmapRaw,
    alive: bool,
}

impl Window {
    /// Maps `len` bytes of `memfd`.
    pub fn map(memfd: impl AsFd, len: usize) -> std::io::Result<Self> {
        use std::os::fd::AsRawFd;
        let map = MmapOptions::new()
            .len(len)
            .map_raw(memfd.as_fd().as_raw_fd())?;
        Ok(Self { map, alive: false })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has no bytes; it always has.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.map.len()),
            "outside the window"
        );
        // SAFETY: the offset lies within the mapping, as just asserted.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// Copies `bytes` into the window.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `to` has room for `bytes`, which cannot overlap a mapping that is never borrowed.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies out of the window.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        let from = self.at(offset, buffer.len());
        // SAFETY: `from` has that many bytes, and `buffer` cannot overlap a mapping that is never borrowed.
        unsafe { std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len()) }
    }

    /// Lends the bytes of the part that the target can only read, to be filled by the kernel or compared.
    pub fn store_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(
            offset > LIVENESS_OFFSET,
            "that part is shared with a writer"
        );
        let at = self.at(offset, len);
        // SAFETY: within the mapping; the target has this part mapped read-only and `&mut self` excludes others here.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }

    /// Takes the robust lock that tells the runner its tracer lives. The calling thread must be the tracer: when it
    /// dies the kernel sets `FUTEX_OWNER_DIED` in the lock word (get_robust_list(2)), before it detaches.
    pub fn show_alive(&mut self) -> Result<(), Errno> {
        if self.alive {
            return Ok(());
        }
        let mutex = self
            .at(LIVENESS_OFFSET, size_of::<libc::pthread_mutex_t>())
            .cast::<libc::pthread_mutex_t>();
        // SAFETY: `mutex` points to page-aligned memory of sufficient size that stays mapped while the lock is held
        // (it is given back in `hide` or on drop); nobody else locks it, and the target cannot write to it.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            check(libc::pthread_mutexattr_init(&raw mut attributes))?;
            check(libc::pthread_mutexattr_setrobust(
                &raw mut attributes,
                libc::PTHREAD_MUTEX_ROBUST,
            ))?;
            check(libc::pthread_mutexattr_setpshared(
                &raw mut attributes,
                libc::PTHREAD_PROCESS_SHARED,
            ))?;
            check(libc::pthread_mutex_init(mutex, &raw const attributes))?;
            check(libc::pthread_mutexattr_destroy(&raw mut attributes))?;
            check(libc::pthread_mutex_lock(mutex))?;
        }
        self.alive = true;
        Ok(())
    }

    /// Gives back the lock of [`Window::show_alive`].
    pub fn hide(&mut self) {
        if std::mem::take(&mut self.alive) {
            let mutex = self
                .at(LIVENESS_OFFSET, size_of::<libc::pthread_mutex_t>())
                .cast();
            // SAFETY: the lock was taken by `show_alive` and is still mapped.
            unsafe { libc::pthread_mutex_unlock(mutex) };
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.hide();
    }
}

fn check(error: i32) -> Result<(), Errno> {
    if error == 0 {
        Ok(())
    } else {
        Err(Errno::from_raw(error))
    }
}
