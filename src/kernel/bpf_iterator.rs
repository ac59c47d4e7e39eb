//! BPF iterators over what the kernel knows of one process (Documentation/bpf/bpf_iterators.rst, Linux 6.1 for a single process).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::btf;

/// A loaded program, which an iterator calls with each thing that it comes to.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// One of its instructions (`struct bpf_insn`).
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Part of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
    version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    debug: [u32; 9],
    attach_to: u32,
}

/// Part of it for `BPF_LINK_CREATE`.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_len: u32,
    pad: u32,
}

/// `union bpf_iter_link_info`, of a task.
#[repr(C)]
struct OfTask {
    thread: u32,
    process: u32,
    pidfd: u32,
    pad: u32,
}

/// Part of `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct Iterate {
    link: u32,
    flags: u32,
}

const _: () = assert!(std::mem::offset_of!(Load, attach_type) == 68);
const _: () = assert!(std::mem::offset_of!(Load, attach_to) == 108 && size_of::<OfTask>() == 16);

const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const ITER_CREATE: libc::c_long = 33;
const TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// bpf(2) with a call that gives a descriptor.
fn descriptor<T>(command: libc::c_long, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: `attributes` is the part of union bpf_attr that the command looks at, its size is given, the kernel takes the
    // rest for zero; what it points to outlives the call in all callers.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// An instruction: its code, the registers it writes to and reads from, an offset and a number (RFC 9669).
pub(super) fn step(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

// Codes of instructions (RFC 9669), all on 64 bits.
pub(super) const LOAD: u8 = 0x79;
pub(super) const STORE: u8 = 0x7b;
pub(super) const STORE_NUMBER: u8 = 0x7a;
pub(super) const MOVE: u8 = 0xbf;
pub(super) const MOVE_NUMBER: u8 = 0xb7;
pub(super) const ADD_NUMBER: u8 = 0x07;
pub(super) const JUMP_IF_IS: u8 = 0x15;
pub(super) const CALL: u8 = 0x85;
pub(super) const EXIT: u8 = 0x95;

// Functions of the kernel that a program may call (bpf-helpers(7)).
pub(super) const KTIME_GET_NS: i32 = 5;
pub(super) const PROBE_READ_KERNEL: i32 = 113;
pub(super) const KTIME_GET_BOOT_NS: i32 = 125;
pub(super) const SEQ_WRITE: i32 = 127;

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
        let load = Load {
            kind: TRACING,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"Dual MIT/GPL".as_ptr() as u64,
            log: [0; 4],
            version: 0,
            flags: 0,
            name: *b"snapback\0\0\0\0\0\0\0\0",
            interface: 0,
            attach_type: TRACE_ITER,
            debug: [0; 9],
            attach_to,
        };
        descriptor(PROG_LOAD, &load).map(Self)
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
        let task = OfTask {
            thread,
            process,
            pidfd: 0,
            pad: 0,
        };
        let link = Link {
            program: self.0.as_raw_fd() as u32,
            target: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            info: std::ptr::from_ref(&task) as u64,
            info_len: size_of::<OfTask>() as u32,
            pad: 0,
        };
        let link = descriptor(LINK_CREATE, &link)?;
        let iterate = Iterate {
            link: link.as_raw_fd() as u32,
            flags: 0,
        };
        let mut file = File::from(descriptor(ITER_CREATE, &iterate)?);
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
