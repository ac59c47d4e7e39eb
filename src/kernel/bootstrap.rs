//! The first instructions in a target that has no window yet. They need no stack and no memory to write to, change general
//! registers only, and go home by themselves if the tracer dies.

use super::ptrace::Registers;
use super::runner::home;

/// Code that makes one system call with the registers it is started with, and then goes home to where `regs` are, with the
/// signal mask `mask`.
pub fn call(regs: &Registers, mask: u64) -> Vec<u8> {
    let mut code = Code(Vec::new());
    code.syscall();
    code.go_home(regs, mask);
    code.0
}

/// What [`opening`] is to map.
#[derive(Debug, Clone, Copy)]
pub struct Opening<'n> {
    /// The name of the memfd, with a final NUL.
    pub name: &'n [u8],
    /// Flags of memfd_create(2).
    pub memfd_flags: u32,
    /// Address, or a hint, and length of the mapping.
    pub place: (u64, u64),
    /// Protection and flags of mmap(2).
    pub protection: (i32, i32),
    /// Flags of userfaultfd(2).
    pub userfaultfd_flags: i32,
}

/// Code that makes a memfd, maps it, makes a userfaultfd and stops with `SIGTRAP`. Resumed, it takes all of that back and
/// goes home to where `regs` are, with the signal mask `mask`. Also returns where it stops, counted from its start.
pub fn opening(what: &Opening<'_>, regs: &Registers, mask: u64) -> (Vec<u8>, u64) {
    let mut code = Code(Vec::new());
    // Not made yet: what would be taken back below.
    code.extend([0x49, 0x83, 0xc8, 0xff]); // or r8, -1
    code.extend([0x49, 0x83, 0xc9, 0xff]); // or r9, -1
    code.extend([0x49, 0x83, 0xca, 0xff]); // or r10, -1
    code.extend([0x48, 0x8d, 0x3d]); // lea rdi, [rip + name]
    let name_offset_at = code.placeholder();
    code.mov_esi(what.memfd_flags);
    code.number(libc::SYS_memfd_create);
    code.syscall();
    code.extend([0x49, 0x89, 0xc0]); // mov r8, rax
    code.extend([0x48, 0x85, 0xc0]); // test rax, rax
    code.extend([0x78, 0]); // js stop
    let jump_at = code.0.len();
    code.movabs(RDI, what.place.0);
    code.movabs(RSI, what.place.1);
    code.movabs(RDX, what.protection.0 as u64);
    code.movabs(R10, what.protection.1 as u64);
    code.extend([0x45, 0x31, 0xc9]); // xor r9d, r9d
    code.number(libc::SYS_mmap);
    code.syscall();
    code.extend([0x49, 0x89, 0xc1]); // mov r9, rax
    code.mov_edi(what.userfaultfd_flags as u32);
    code.number(libc::SYS_userfaultfd);
    code.syscall();
    code.extend([0x49, 0x89, 0xc2]); // mov r10, rax
    code.0[jump_at - 1] = (code.0.len() - jump_at) as u8;
    // As the runner does it, and for the same reason.
    code.number(libc::SYS_gettid);
    code.syscall();
    code.extend([0x89, 0xc7]); // mov edi, eax
    code.mov_esi(libc::SIGTRAP as u32);
    code.number(libc::SYS_tkill);
    code.syscall();
    let stops_at = code.0.len() as u64;
    code.extend([0x4c, 0x89, 0xc7]); // mov rdi, r8
    code.number(libc::SYS_close);
    code.syscall();
    code.extend([0x4c, 0x89, 0xd7]); // mov rdi, r10
    code.number(libc::SYS_close);
    code.syscall();
    code.extend([0x4c, 0x89, 0xcf]); // mov rdi, r9
    code.movabs(RSI, what.place.1);
    code.number(libc::SYS_munmap);
    code.syscall();
    code.go_home(regs, mask);
    code.resolve(name_offset_at);
    code.extend(what.name.iter().copied());
    (code.0, stops_at)
}

/// What memfd_create(2), mmap(2) and userfaultfd(2) have returned to a thread that has stopped at the end of [`opening`]; the last
/// two were not called if the first had failed.
pub fn opened(regs: &Registers) -> [u64; 3] {
    [regs.r8, regs.r9, regs.r10]
}

/// Machine code that is being written.
struct Code(Vec<u8>);

/// A register, as a 64-bit `mov` with an immediate value names it.
type Register = [u8; 2];
const RAX: Register = [0x48, 0xb8];
const RCX: Register = [0x48, 0xb9];
const RDX: Register = [0x48, 0xba];
const RSI: Register = [0x48, 0xbe];
const RDI: Register = [0x48, 0xbf];
const R8: Register = [0x49, 0xb8];
const R9: Register = [0x49, 0xb9];
const R10: Register = [0x49, 0xba];
const R11: Register = [0x49, 0xbb];

impl Code {
    fn extend(&mut self, bytes: impl IntoIterator<Item = u8>) {
        self.0.extend(bytes);
    }

    fn syscall(&mut self) {
        self.extend([0x0f, 0x05]);
    }

    fn number(&mut self, number: libc::c_long) {
        self.extend([0xb8]); // mov eax, number
        self.extend((number as u32).to_le_bytes());
    }

    fn mov_edi(&mut self, value: u32) {
        self.extend([0xbf]);
        self.extend(value.to_le_bytes());
    }

    fn mov_esi(&mut self, value: u32) {
        self.extend([0xbe]);
        self.extend(value.to_le_bytes());
    }

    fn movabs(&mut self, register: Register, value: u64) {
        self.extend(register);
        self.extend(value.to_le_bytes());
    }

    /// Room for an offset from here to what [`Code::resolve`] says.
    fn placeholder(&mut self) -> usize {
        self.extend([0; 4]);
        self.0.len() - 4
    }

    /// What comes next is what that offset leads to.
    fn resolve(&mut self, placeholder: usize) {
        let offset = (self.0.len() - (placeholder + 4)) as u32;
        self.0[placeholder..placeholder + 4].copy_from_slice(&offset.to_le_bytes());
    }

    /// Puts back the signal mask and the registers. Those that no system call changes and no code here does are left.
    fn go_home(&mut self, regs: &Registers, mask: u64) {
        let (home, _) = home(regs);
        self.mov_edi(libc::SIG_SETMASK as u32);
        self.extend([0x48, 0x8d, 0x35]); // lea rsi, [rip + mask]
        let mask_offset_at = self.placeholder();
        self.extend([0x41, 0xba, 8, 0, 0, 0]); // mov r10d, 8
        self.number(libc::SYS_rt_sigprocmask);
        self.extend([0x31, 0xd2]); // xor edx, edx
        self.syscall();
        let flags = (regs.eflags & ARITHMETIC_FLAGS) << 8;
        let values = [
            (RCX, home[2]),
            (RDX, home[3]),
            (RSI, home[4]),
            (RDI, home[5]),
            (R8, home[7]),
            (R9, home[8]),
            (R10, home[9]),
            (R11, home[10]),
            (RAX, flags),
        ];
        for (register, value) in values {
            self.movabs(register, value);
        }
        if regs.eflags & OVERFLOW_FLAG != 0 {
            // 0x7f + 1 overflows; mov and sahf leave the overflow flag alone.
            self.extend([0xb0, 0x7f, 0x04, 0x01]); // mov al, 0x7f; add al, 1
        } // else `xor edx, edx` has cleared it, which system calls leave alone
        self.extend([0x9e]); // sahf
        self.movabs(RAX, home[0]);
        self.extend([0xff, 0x25, 0, 0, 0, 0]); // jmp [rip + 0]
        self.extend(home[16].to_le_bytes());
        self.resolve(mask_offset_at);
        self.extend(mask.to_le_bytes());
    }
}

/// SF, ZF, AF, PF and CF, which `sahf` sets from AH.
const ARITHMETIC_FLAGS: u64 = 0xd5;
const OVERFLOW_FLAG: u64 = 0x800;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::registers::{WORDS, from_words};

    fn opening_with(eflags: u64) -> (Vec<u8>, u64) {
        let registers = Registers {
            eflags,
            ..from_words(&[0; WORDS])
        };
        let what = Opening {
            name: b"name\0",
            memfd_flags: 0,
            place: (0, 4096),
            protection: (0, 0),
            userfaultfd_flags: 0,
        };
        opening(&what, &registers, 0)
    }

    #[test]
    fn it_stops_right_behind_a_system_call_and_ends_with_the_name() {
        for eflags in [0, OVERFLOW_FLAG] {
            let (code, stops_at) = opening_with(eflags);
            let stop = stops_at as usize;
            assert_eq!(code[stop - 2..stop], [0x0f, 0x05]);
            assert!(code.ends_with(b"name\0"));
            // The placeholder of the name leads from behind itself to the name.
            let lea = code
                .windows(3)
                .position(|bytes| bytes == [0x48, 0x8d, 0x3d]);
            let at = lea.expect("lea rdi") + 3;
            let offset = u32::from_le_bytes(code[at..at + 4].try_into().unwrap()) as usize;
            assert_eq!(at + 4 + offset, code.len() - 5);
            assert!(code.len() <= 360, "{}", code.len());
        }
    }
}
