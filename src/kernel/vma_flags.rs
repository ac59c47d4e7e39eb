//! The kernel's own flags of all VMAs of a process, without a walk over its pages as `smaps` makes: by a BPF iterator over VMAs
//! (`task_vma`), whose program copies some words of each. What the bits mean differs between kernels.

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bpf::{self, Instruction, step};
use super::bpf_iterator::{Of, Program};
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
pub struct Reader(Program);

/// `struct bpf_iter__task_vma` is meta, task, VMA; the first word of `struct bpf_iter_meta` is the file that is written.
fn program([start, end, flags]: [i16; 3], policy: Option<i16>) -> Vec<Instruction> {
    // Kernels without NUMA have no policies.
    let policy: Vec<Instruction> = match policy {
        Some(policy) => vec![
            step(bpf::LOAD, 2, 7, policy, 0),
            step(bpf::JUMP_IF_IS, 2, 0, 1, 0),
            step(bpf::STORE_NUMBER, 10, 0, -8, 1),
        ],
        None => Vec::new(),
    };
    let begin = vec![
        step(bpf::MOVE, 6, 1, 0, 0),
        step(bpf::LOAD, 7, 6, 16, 0),
        step(bpf::LOAD, 1, 6, 0, 0),
        step(bpf::LOAD, 1, 1, 0, 0),
        step(bpf::STORE_NUMBER, 10, 0, -32, 0),
        step(bpf::STORE_NUMBER, 10, 0, -24, 0),
        step(bpf::STORE_NUMBER, 10, 0, -16, 0),
        step(bpf::STORE_NUMBER, 10, 0, -8, 0),
        // It is called without a VMA at the end: then zeroes are written.
        step(bpf::JUMP_IF_IS, 7, 0, 6 + policy.len() as i16, 0),
        step(bpf::LOAD, 2, 7, start, 0),
        step(bpf::STORE, 10, 2, -32, 0),
        step(bpf::LOAD, 2, 7, end, 0),
        step(bpf::STORE, 10, 2, -24, 0),
        step(bpf::LOAD, 2, 7, flags, 0),
        step(bpf::STORE, 10, 2, -16, 0),
    ];
    let end = vec![
        step(bpf::MOVE, 2, 10, 0, 0),
        step(bpf::ADD_NUMBER, 2, 0, 0, -32),
        step(bpf::MOVE_NUMBER, 3, 0, 0, size_of::<Flagged>() as i32),
        step(bpf::CALL, 0, 0, 0, bpf::SEQ_WRITE),
        step(bpf::MOVE_NUMBER, 0, 0, 0, 0),
        step(bpf::EXIT, 0, 0, 0, 0),
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
        let offset = |name| types.offset("vm_area_struct", name);
        let (Some(start), Some(end), Some(flags)) =
            (offset("vm_start"), offset("vm_end"), offset("vm_flags"))
        else {
            return Err(Errno::ENOSYS);
        };
        let instructions = program([start, end, flags], offset("vm_policy"));
        Program::load(&types, "bpf_iter_task_vma", &instructions).map(Self)
    }

    /// Reads the flags of all VMAs of a process, in the order of addresses.
    ///
    /// # Errors
    ///
    /// It has no memory, or this kernel can't look at a single one.
    pub fn read(&self, pid: Pid) -> std::io::Result<Vec<Flagged>> {
        self.0
            .read(Of::Thread(pid.as_raw()), |vma: &Flagged| vma.end == 0)
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
