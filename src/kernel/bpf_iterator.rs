//! BPF iterators over what the kernel knows of one process (Documentation/bpf/bpf_iterators.rst, Linux 6.1 for a single process).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::bpf::{self, Instruction};
use super::btf;

/// A loaded program, which an iterator calls with each thing that it comes to.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// Part of `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct Iterate {
    link: u32,
    flags: u32,
}

const ITER_CREATE: libc::c_long = 33;
/// `BPF_TRACE_ITER`
const TRACE_ITER: u32 = 28;

/// Whose things an iterator comes to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of {
    /// One thread's.
    Thread(i32),
    /// All threads' of a process.
    Process(i32),
}

impl Program {
    /// Loads a program for the iterator of this name, which takes some milliseconds.
    ///
    /// # Errors
    ///
    /// This kernel has no such iterator, or we may not (`CAP_BPF`, `CAP_PERFMON`).
    pub(super) fn load(
        types: &btf::Types,
        iterator: &str,
        instructions: &[Instruction],
    ) -> Result<Self, Errno> {
        let attach_to = types.function(iterator).ok_or(Errno::ENOSYS)?;
        bpf::load(instructions, TRACE_ITER, attach_to).map(Self)
    }

    /// What the program writes: records of one size, of which the last, that `is_end` tells, is none.
    ///
    /// # Errors
    ///
    /// The program came to nothing, or this kernel can't look at a single process.
    pub(super) fn read<T: FromBytes + Immutable + KnownLayout>(
        &self,
        of: Of,
        is_end: impl Fn(&T) -> bool,
    ) -> std::io::Result<Vec<T>> {
        let (thread, process) = match of {
            Of::Thread(tid) => (tid as u32, 0),
            Of::Process(pid) => (0, pid as u32),
        };
        // `union bpf_iter_link_info`, of a task: thread, process, pidfd.
        let link = bpf::attach(self.0.as_fd(), TRACE_ITER, &[thread, process, 0, 0])?;
        let iterate = Iterate {
            link: link.as_raw_fd() as u32,
            flags: 0,
        };
        // SAFETY: it is what the command takes, and points to nothing.
        let created = unsafe { bpf::descriptor(ITER_CREATE, &iterate) }?;
        let mut file = File::from(created);
        let mut bytes = Vec::new();
        let mut found = Vec::new();
        // After the end the kernel begins anew, so that has to be told from what was written.
        loop {
            let held = bytes.len();
            bytes.resize(held + (64 << 10), 0);
            let got = file.read(&mut bytes[held..])?;
            bytes.truncate(held + got);
            for record in bytes.chunks_exact(size_of::<T>()).skip(found.len()) {
                match T::read_from_bytes(record) {
                    Ok(record) if !is_end(&record) => found.push(record),
                    _ => return Ok(found),
                }
            }
            if got == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
