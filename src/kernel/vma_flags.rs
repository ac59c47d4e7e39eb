//! The kernel's own flags of all VMAs of a process, without a walk over its pages as `smaps` makes: by a BPF iterator over VMAs
//! (`task_vma`, Linux 6.1 for a single process), whose program copies some words of each. What the bits mean differs between kernels.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::btf;

/// A VMA and its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Flagged {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `vm_flags` of `struct vm_area_struct`.
    pub flags: u64,
    /// 1: it has a memory policy of its own (mbind(2)).
    pub policy: u64,
}

/// The loaded program.
#[derive(Debug)]
pub struct Reader(OwnedFd);

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
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
const SEQ_WRITE: i32 = 127;

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

/// `struct bpf_iter__task_vma` is meta, task, VMA; the first word of `struct bpf_iter_meta` is the file that is written.
fn program([start, end, flags]: [i16; 3], policy: Option<i16>) -> Vec<Instruction> {
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    let step = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    const SET: u8 = 0x7a;
    const IF_ZERO: u8 = 0x15;
    // Kernels without NUMA have no policies.
    let policy: Vec<Instruction> = match policy {
        Some(policy) => vec![
            step(LOAD, 2, 7, policy, 0),
            step(IF_ZERO, 2, 0, 1, 0),
            step(SET, 10, 0, -8, 1),
        ],
        None => Vec::new(),
    };
    let begin = vec![
        step(0xbf, 6, 1, 0, 0),
        step(LOAD, 7, 6, 16, 0),
        step(LOAD, 1, 6, 0, 0),
        step(LOAD, 1, 1, 0, 0),
        step(SET, 10, 0, -32, 0),
        step(SET, 10, 0, -24, 0),
        step(SET, 10, 0, -16, 0),
        step(SET, 10, 0, -8, 0),
        // It is called without a VMA at the end: then zeroes are written.
        step(IF_ZERO, 7, 0, 6 + policy.len() as i16, 0),
        step(LOAD, 2, 7, start, 0),
        step(STORE, 10, 2, -32, 0),
        step(LOAD, 2, 7, end, 0),
        step(STORE, 10, 2, -24, 0),
        step(LOAD, 2, 7, flags, 0),
        step(STORE, 10, 2, -16, 0),
    ];
    let end = vec![
        step(0xbf, 2, 10, 0, 0),
        step(0x07, 2, 0, 0, -32),
        step(0xb7, 3, 0, 0, size_of::<Flagged>() as i32),
        step(0x85, 0, 0, 0, SEQ_WRITE),
        step(0xb7, 0, 0, 0, 0),
        step(0x95, 0, 0, 0, 0),
    ];
    [begin, policy, end].concat()
}

impl Reader {
    /// Loads the program. Takes some milliseconds.
    ///
    /// # Errors
    ///
    /// This kernel has no such iterator or tells nothing of its types, or we may not (`CAP_BPF`, `CAP_PERFMON`).
    pub fn load() -> Result<Self, Errno> {
        let types = btf::Types::of_kernel().ok_or(Errno::ENOENT)?;
        let attach_to = types.function("bpf_iter_task_vma").ok_or(Errno::ENOSYS)?;
        let offset = |name| types.offset("vm_area_struct", name);
        let (Some(start), Some(end), Some(flags)) =
            (offset("vm_start"), offset("vm_end"), offset("vm_flags"))
        else {
            return Err(Errno::ENOSYS);
        };
        let instructions = program([start, end, flags], offset("vm_policy"));
        let load = Load {
            kind: TRACING,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"Dual MIT/GPL".as_ptr() as u64,
            log: [0; 4],
            version: 0,
            flags: 0,
            name: *b"snapback_flags\0\0",
            interface: 0,
            attach_type: TRACE_ITER,
            debug: [0; 9],
            attach_to,
        };
        descriptor(PROG_LOAD, &load).map(Self)
    }

    /// Reads the flags of all VMAs of a process, in the order of addresses.
    ///
    /// # Errors
    ///
    /// It has no memory, or this kernel can't look at a single one.
    pub fn read(&self, pid: Pid) -> std::io::Result<Vec<Flagged>> {
        let task = OfTask {
            thread: pid.as_raw() as u32,
            process: 0,
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
            for record in bytes.chunks_exact(size_of::<Flagged>()).skip(found.len()) {
                match Flagged::read_from_bytes(record) {
                    Ok(record) if record.end != 0 => found.push(record),
                    _ => return Ok(found),
                }
            }
            if got == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::maps;

    #[test]
    fn all_vmas_are_there_and_flags_show() {
        let reader = match Reader::load() {
            Ok(reader) => reader,
            Err(errno @ (Errno::EPERM | Errno::ENOSYS | Errno::ENOENT)) => {
                println!("SKIP no BPF iterators: {errno}");
                return;
            }
            Err(errno) => panic!("{errno}"),
        };
        let map = memmap2::MmapMut::map_anon(64 * 4096).unwrap();
        let at = map.as_ptr() as u64;
        let flags = || {
            let all = reader.read(Pid::this()).unwrap();
            let text = std::fs::read("/proc/self/maps").unwrap();
            let known = maps::parse(&text).unwrap();
            let is_known = |of: &&Flagged| {
                known
                    .iter()
                    .any(|vma| (vma.start, vma.end) == (of.start, of.end))
            };
            // Other tests map and unmap meanwhile.
            assert!(
                all.iter().filter(is_known).count() * 2 > known.len(),
                "{all:x?}"
            );
            all.iter()
                .find(|of| of.start <= at && at < of.end)
                .unwrap()
                .flags
        };
        let plain = flags();
        map.advise(memmap2::Advice::DontFork).unwrap();
        assert_eq!((plain ^ flags()).count_ones(), 1);
        map.advise(memmap2::Advice::DoFork).unwrap();
        assert_eq!(flags(), plain);
    }
}
