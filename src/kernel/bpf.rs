//! bpf(2): programs of a few instructions that are written by hand, and what they share with us.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// An instruction: its code, the registers it writes to and reads from, an offset and a number (RFC 9669).
pub(super) fn step(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let registers = to | from << 4;
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

impl Instruction {
    /// The same with another offset.
    pub(super) fn with_offset(self, offset: i16) -> Self {
        Self { offset, ..self }
    }
}

// Codes of instructions (RFC 9669), on 64 bits but for `LOAD_HALF`.
pub(super) const LOAD: u8 = 0x79;
pub(super) const LOAD_HALF: u8 = 0x61;
pub(super) const LOAD_MAP: u8 = 0x18;
pub(super) const STORE: u8 = 0x7b;
pub(super) const STORE_NUMBER: u8 = 0x7a;
pub(super) const MOVE: u8 = 0xbf;
pub(super) const MOVE_NUMBER: u8 = 0xb7;
pub(super) const ADD_NUMBER: u8 = 0x07;
pub(super) const SHIFT_LEFT: u8 = 0x67;
pub(super) const SHIFT_RIGHT: u8 = 0x77;
pub(super) const OR: u8 = 0x4f;
pub(super) const XOR: u8 = 0xaf;
pub(super) const JUMP: u8 = 0x05;
pub(super) const JUMP_IF_IS: u8 = 0x15;
pub(super) const JUMP_IF_NOT: u8 = 0x55;
pub(super) const JUMP_IF_SAME: u8 = 0x1d;
pub(super) const CALL: u8 = 0x85;
pub(super) const EXIT: u8 = 0x95;

// Functions of the kernel that a program may call (bpf-helpers(7)).
pub(super) const MAP_LOOKUP: i32 = 1;
pub(super) const MAP_UPDATE: i32 = 2;
pub(super) const KTIME_GET_NS: i32 = 5;
pub(super) const PROBE_READ_KERNEL: i32 = 113;
pub(super) const KTIME_GET_BOOT_NS: i32 = 125;
pub(super) const SEQ_WRITE: i32 = 127;
pub(super) const RING_OUTPUT: i32 = 130;

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

/// Part of it for `BPF_MAP_CREATE`.
#[repr(C)]
struct Map {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    node: u32,
    name: [u8; 16],
}

/// Part of it for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct Ask {
    fd: u32,
    len: u32,
    info: u64,
}

/// `struct bpf_prog_info`, as far as it was there in Linux 5.12.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Info {
    before: [u64; 26],
    missed: u64,
}

const _: () = assert!(std::mem::offset_of!(Load, attach_type) == 68);
const _: () = assert!(std::mem::offset_of!(Load, attach_to) == 108);
const _: () = assert!(size_of::<Link>() == 32 && size_of::<Map>() == 44 && size_of::<Ask>() == 16);

const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_CREATE: libc::c_long = 28;
const TRACING: u32 = 26;

/// A call with the part of `union bpf_attr` that the command looks at; the kernel takes the rest for zero. `attributes` and what
/// it points to must be as the command wants them.
unsafe fn call<T>(command: libc::c_long, attributes: &T) -> Result<i32, Errno> {
    let attributes = std::ptr::from_ref(attributes);
    // SAFETY: the caller's.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    Errno::result(done).map(|done| done as i32)
}

/// The same of a command that gives a descriptor.
///
/// # Safety
///
/// `attributes`, and what it points to, is what the command takes.
pub(super) unsafe fn descriptor<T>(
    command: libc::c_long,
    attributes: &T,
) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's.
    let fd = unsafe { call(command, attributes) }?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Loads a program of type `BPF_PROG_TYPE_TRACING`. `attach_to` is the number of the type of what it is for.
///
/// # Errors
///
/// Those of the kernel: its verifier says `EACCES` or `EINVAL`.
pub(super) fn load(
    instructions: &[Instruction],
    attach_type: u32,
    attach_to: u32,
) -> Result<OwnedFd, Errno> {
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
        attach_type,
        debug: [0; 9],
        attach_to,
    };
    // SAFETY: it is what the command takes; instructions and license outlive the call.
    unsafe { descriptor(PROG_LOAD, &load) }
}

/// Attaches a program for as long as what is returned is open. `info` is the part of `union bpf_iter_link_info` that it needs.
pub(super) fn attach(
    program: BorrowedFd<'_>,
    attach_type: u32,
    info: &[u32],
) -> Result<OwnedFd, Errno> {
    let link = Link {
        program: program.as_raw_fd() as u32,
        target: 0,
        attach_type,
        flags: 0,
        info: if info.is_empty() {
            0
        } else {
            info.as_ptr() as u64
        },
        info_len: size_of_val(info) as u32,
        pad: 0,
    };
    // SAFETY: it is what the command takes; `info` outlives the call, and its length is right.
    unsafe { descriptor(LINK_CREATE, &link) }
}

/// Makes a map (`BPF_MAP_TYPE_*`) with keys and values of these sizes in bytes.
pub(super) fn map(
    kind: u32,
    (key_size, value_size): (u32, u32),
    entries: u32,
    flags: u32,
) -> Result<OwnedFd, Errno> {
    let map = Map {
        kind,
        key_size,
        value_size,
        entries,
        flags,
        inner: 0,
        node: 0,
        name: *b"snapback\0\0\0\0\0\0\0\0",
    };
    // SAFETY: it is what the command takes, and points to nothing.
    unsafe { descriptor(MAP_CREATE, &map) }
}

/// How often a program was not run because it was running on that processor already (Linux 5.12).
pub(super) fn missed(program: &impl AsFd) -> Result<u64, Errno> {
    let mut info = Info {
        before: [0; 26],
        missed: 0,
    };
    let ask = Ask {
        fd: program.as_fd().as_raw_fd() as u32,
        len: size_of::<Info>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: it is what the command takes; `info` is as long as it says, and any bytes are a value of it. The kernel takes
    // the arrays that it could fill for absent, as their lengths are zero.
    unsafe { call(OBJ_GET_INFO_BY_FD, &ask) }?;
    Ok(info.missed)
}
