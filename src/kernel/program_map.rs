//! Telling the kernel where the parts of a program are: `PR_SET_MM_MAP` (Linux 3.18), which needs no privilege.

use zerocopy::{Immutable, IntoBytes};

use super::procfs::Bounds;

/// What prctl(2) is to do with [`libc::PR_SET_MM`].
pub const PR_SET_MM_MAP: i32 = 14;

/// `struct prctl_mm_map` (`linux/prctl.h`).
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct ProgramMap {
    code: [u64; 2],
    data: [u64; 2],
    brk: [u64; 2],
    stack: u64,
    arguments: [u64; 2],
    environment: [u64; 2],
    /// Address of the auxiliary vector to set.
    pub auxv: u64,
    /// Its length in bytes; 0: it stays.
    pub auxv_size: u32,
    /// A descriptor of the program's file; -1: it stays.
    pub program: i32,
}

impl ProgramMap {
    /// Parts at these places, with the program break at `brk`; auxiliary vector and file stay.
    pub fn of(bounds: &Bounds, brk: u64) -> Self {
        let [code, code_end, stack, data, data_end, heap, rest @ ..] = *bounds;
        let [arguments, arguments_end, environment, environment_end] = rest;
        Self {
            code: [code, code_end],
            data: [data, data_end],
            brk: [heap, brk],
            stack,
            arguments: [arguments, arguments_end],
            environment: [environment, environment_end],
            auxv: 0,
            auxv_size: 0,
            program: -1,
        }
    }
}
