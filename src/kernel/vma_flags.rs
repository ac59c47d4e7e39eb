//! The kernel's own flags of all VMAs of a process, without a walk over its pages as `smaps` makes: by a BPF iterator over VMAs
//! (`task_vma`, Linux 6.1 for a single process), whose program copies three words of each. What the bits mean differs between kernels.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bpf::{self, CALL, EXIT, Instruction, LOAD, MOVE, SET, STORE, step};
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
}

/// The loaded program.
#[derive(Debug)]
pub struct Reader(OwnedFd);

/// Part of `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct Iterate {
    link: u32,
    flags: u32,
}

const ITER_CREATE: libc::c_long = 33;
const TRACE_ITER: u32 = 28;
const SEQ_WRITE: i32 = 127;

/// `struct bpf_iter__task_vma` is meta, task, VMA; the first word of `struct bpf_iter_meta` is the file that is written.
fn program([start, end, flags]: [i16; 3]) -> Vec<Instruction> {
    const ZERO: u8 = 0x7a;
    vec![
        step(MOVE, 6, 1, 0, 0),
        step(LOAD, 7, 6, 16, 0),
        step(LOAD, 1, 6, 0, 0),
        step(LOAD, 1, 1, 0, 0),
        step(ZERO, 10, 0, -24, 0),
        step(ZERO, 10, 0, -16, 0),
        step(ZERO, 10, 0, -8, 0),
        // It is called without a VMA at the end: then zeroes are written.
        step(0x15, 7, 0, 6, 0),
        step(LOAD, 2, 7, start, 0),
        step(STORE, 10, 2, -24, 0),
        step(LOAD, 2, 7, end, 0),
        step(STORE, 10, 2, -16, 0),
        step(LOAD, 2, 7, flags, 0),
        step(STORE, 10, 2, -8, 0),
        step(MOVE, 2, 10, 0, 0),
        step(0x07, 2, 0, 0, -24),
        step(SET, 3, 0, 0, 24),
        step(CALL, 0, 0, 0, SEQ_WRITE),
        step(SET, 0, 0, 0, 0),
        step(EXIT, 0, 0, 0, 0),
    ]
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
        let instructions = program([start, end, flags]);
        bpf::load(b"snapback_flags\0\0", &instructions, TRACE_ITER, attach_to).map(Self)
    }

    /// Reads the flags of all VMAs of a process, in the order of addresses.
    ///
    /// # Errors
    ///
    /// It has no memory, or this kernel can't look at a single one.
    pub fn read(&self, pid: Pid) -> std::io::Result<Vec<Flagged>> {
        // `union bpf_iter_link_info` of a single task: thread, process, pidfd.
        let task = [pid.as_raw() as u32, 0, 0, 0];
        let link = bpf::attach(self.0.as_fd(), TRACE_ITER, &task)?;
        let iterate = Iterate {
            link: link.as_raw_fd() as u32,
            flags: 0,
        };
        // SAFETY: it is what the command takes, and points to nothing.
        let mut file = File::from(unsafe { bpf::descriptor(ITER_CREATE, &iterate) }?);
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
