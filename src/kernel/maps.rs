//! `/proc/PID/maps` (proc_pid_maps(5)).

use std::fmt;

/// One virtual memory area as `maps` shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u8,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Offset into the file in bytes; 0 of anonymous memory.
    pub offset: u64,
    /// Device of the file.
    pub device: u64,
    /// Inode of the file; 0 of anonymous memory.
    pub inode: u64,
    /// Path or `[name]`; empty if it has none.
    pub name: Box<[u8]>,
}

impl Vma {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has no bytes; the kernel shows no such VMA.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether no file is behind it.
    pub fn is_anonymous(&self) -> bool {
        self.inode == 0 && self.device == 0
    }

    /// vDSO, vvar and vsyscall: the kernel's own, the same for the life of the address space.
    pub fn is_special(&self) -> bool {
        [&b"[vdso]"[..], b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"].contains(&&*self.name)
    }

    /// Whether it is of a System V shared memory segment, whose id is its inode then (`ipc/shm.c`).
    pub fn is_segment(&self) -> bool {
        self.shared && self.name.starts_with(b"/SYSV")
    }

    /// Whether it was made by `MAP_HUGETLB` without a file.
    pub fn is_of_huge_pages(&self) -> bool {
        self.name.starts_with(b"/anon_hugepage")
    }

    /// Whether `next` continues it: adjacent, and alike in all else.
    pub fn continued_by(&self, next: &Self) -> bool {
        self.end == next.start
            && self.prot == next.prot
            && self.shared == next.shared
            && (self.device, self.inode) == (next.device, next.inode)
            && self.name == next.name
            && (self.is_anonymous() || self.offset + self.len() == next.offset)
    }
}

impl fmt::Debug for Vma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |bit, letter| {
            if self.prot & bit as u8 != 0 {
                letter
            } else {
                '-'
            }
        };
        write!(
            f,
            "{:x}-{:x} {}{}{}{} {:x} {:x}:{} {}",
            self.start,
            self.end,
            bit(libc::PROT_READ, 'r'),
            bit(libc::PROT_WRITE, 'w'),
            bit(libc::PROT_EXEC, 'x'),
            if self.shared { 's' } else { 'p' },
            self.offset,
            self.device,
            self.inode,
            String::from_utf8_lossy(&self.name)
        )
    }
}

/// Parses the text of a maps file. `None`: not the format of proc_pid_maps(5).
pub fn parse(text: &[u8]) -> Option<Vec<Vma>> {
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut rest = line;
    let start = number(&mut rest, b'-', 16)?;
    let end = number(&mut rest, b' ', 16)?;
    let (mode, after) = rest.split_at_checked(5)?;
    rest = after;
    let offset = number(&mut rest, b' ', 16)?;
    let major = number(&mut rest, b':', 16)?;
    let minor = number(&mut rest, b' ', 16)?;
    let inode = number(&mut rest, b' ', 10)?;
    let prot = [
        (b'r', libc::PROT_READ),
        (b'w', libc::PROT_WRITE),
        (b'x', libc::PROT_EXEC),
    ]
    .iter()
    .zip(mode)
    .filter(|((letter, _), byte)| letter == *byte)
    .fold(0, |prot, ((_, bit), _)| prot | *bit as u8);
    Some(Vma {
        start,
        end,
        prot,
        shared: mode[3] == b's',
        offset,
        device: nix::sys::stat::makedev(major, minor),
        inode,
        name: rest.trim_ascii_start().into(),
    })
}

/// Takes the digits up to `delimiter` (or the end of the line) off the front of `rest`.
fn number(rest: &mut &[u8], delimiter: u8, radix: u32) -> Option<u64> {
    let at = rest
        .iter()
        .position(|&byte| byte == delimiter)
        .unwrap_or(rest.len());
    let (digits, after) = rest.split_at(at);
    *rest = after.get(1..).unwrap_or_default();
    let mut value = 0u64;
    for &digit in digits {
        value = value.checked_mul(u64::from(radix))? + u64::from((digit as char).to_digit(radix)?);
    }
    (!digits.is_empty()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_every_shape_of_line() {
        let text = b"55de9c867000-55de9c868000 r-xp 00001000 fe:00 10010765                   /tmp/a b (deleted)\n\
            7fd13bf26000-7fd13bf2a000 r--p 00000000 00:00 0                          [vvar]\n\
            7fd13bf30000-7fd13bf2f000 ---s 00000000 00:00 0 \n";
        let vmas = parse(text).unwrap();
        assert_eq!(vmas.len(), 3);
        assert_eq!(vmas[0].inode, 10_010_765);
        assert_eq!(&*vmas[0].name, b"/tmp/a b (deleted)");
        assert_eq!(vmas[0].prot, (libc::PROT_READ | libc::PROT_EXEC) as u8);
        assert!(vmas[1].is_special() && vmas[1].is_anonymous());
        assert!(vmas[2].shared && vmas[2].name.is_empty());
    }

    #[test]
    fn refuses_what_is_not_maps() {
        assert!(parse(b"hello\n").is_none());
        assert!(parse(b"1-2 r-x\n").is_none());
    }

    #[test]
    fn parses_our_own() {
        let text = std::fs::read("/proc/self/maps").unwrap();
        assert!(
            parse(&text)
                .unwrap()
                .iter()
                .any(|vma| &*vma.name == b"[stack]")
        );
    }
}
