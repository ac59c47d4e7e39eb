//! Reading and writing another process's memory: process_vm_readv(2), process_vm_writev(2), `/proc/PID/mem`.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::unistd::Pid;

/// A range of a target's address space, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: usize,
}

/// Most iovecs one call takes (`UIO_MAXIOV`).
const MOST: usize = 1024;

/// Reads the ranges of `pid`, one after the other, into `buffer`. Fails with `EFAULT` if one is not readable.
pub fn read(pid: Pid, ranges: &[Range], buffer: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    for group in ranges.chunks(MOST) {
        let len: usize = group.iter().map(|range| range.len).sum();
        let target = &mut buffer[done..done + len];
        let local = libc::iovec {
            iov_base: target.as_mut_ptr().cast(),
            iov_len: len,
        };
        let remote = iovecs(group);
        // SAFETY: `local` covers exactly the exclusive slice `target`; the remote side is checked by the kernel.
        let got = Errno::result(unsafe {
            libc::process_vm_readv(
                pid.as_raw(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as u64,
                0,
            )
        })?;
        if got as usize != len {
            return Err(Errno::EFAULT);
        }
        done += len;
    }
    Ok(())
}

/// Writes `buffer` to the ranges of `pid`, one after the other. Only writable memory: else `EFAULT`.
pub fn write(pid: Pid, ranges: &[Range], buffer: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    for group in ranges.chunks(MOST) {
        let len: usize = group.iter().map(|range| range.len).sum();
        let source = &buffer[done..done + len];
        let local = libc::iovec {
            iov_base: source.as_ptr().cast_mut().cast(),
            iov_len: len,
        };
        let remote = iovecs(group);
        // SAFETY: the local side is only read, within `source`; the remote side is checked by the kernel.
        let got = Errno::result(unsafe {
            libc::process_vm_writev(
                pid.as_raw(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as u64,
                0,
            )
        })?;
        if got as usize != len {
            return Err(Errno::EFAULT);
        }
        done += len;
    }
    Ok(())
}

fn iovecs(ranges: &[Range]) -> Vec<libc::iovec> {
    ranges
        .iter()
        .map(|range| libc::iovec {
            iov_base: range.start as *mut _,
            iov_len: range.len,
        })
        .collect()
}
