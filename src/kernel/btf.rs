//! What the kernel tells of its own types (`/sys/kernel/btf/vmlinux`, Documentation/bpf/btf.rst).

/// All types, in the order of their numbers; number 1 is the first.
#[derive(Debug)]
pub(super) struct Types {
    bytes: Vec<u8>,
    /// Where the record of each is.
    places: Vec<usize>,
    strings: usize,
}

const HEADER: usize = 12;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const FUNCTION: u32 = 12;

impl Types {
    /// Those of the running kernel, if it tells.
    pub(super) fn of_kernel() -> Option<Self> {
        Self::parse(std::fs::read("/sys/kernel/btf/vmlinux").ok()?)
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        if u16::from_ne_bytes(*bytes.first_chunk()?) != 0xeb9f {
            return None;
        }
        let header = word(4)? as usize;
        let mut at = header + word(8)? as usize;
        let end = at + word(12)? as usize;
        let strings = header + word(16)? as usize;
        let mut places = vec![0];
        while at < end {
            let info = word(at + 4)?;
            let (members, kind) = (info as usize & 0xffff, info >> 24 & 0x1f);
            let tail = match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                STRUCT | UNION | 15 | 19 => members * 12,
                6 | 13 => members * 8,
                2 | 7..=12 | 16 | 18 => 0,
                // Not known: neither is where the next one begins.
                _ => return None,
            };
            places.push(at);
            at += HEADER + tail;
        }
        Some(Self {
            bytes,
            places,
            strings,
        })
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..).and_then(<[u8]>::first_chunk);
        word.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    fn kind(&self, place: usize) -> u32 {
        self.word(place + 4) >> 24 & 0x1f
    }

    fn is_named(&self, place: usize, name: &str) -> bool {
        let at = self.strings + self.word(place) as usize;
        let text = self.bytes.get(at..at + name.len() + 1);
        text.is_some_and(|text| text[..name.len()] == *name.as_bytes() && text[name.len()] == 0)
    }

    fn find(&self, kind: u32, name: &str) -> Option<usize> {
        let is_it = |place: &usize| self.kind(*place) == kind && self.is_named(*place, name);
        (1..self.places.len()).find(|number| is_it(&self.places[*number]))
    }

    /// The number of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNCTION, name).map(|number| number as u32)
    }

    /// The number of what a tracepoint's functions look like.
    pub(super) fn tracepoint(&self, name: &str) -> Option<u32> {
        let found = self.find(TYPEDEF, &format!("btf_trace_{name}"));
        found.map(|number| number as u32)
    }

    /// The offset in bytes of a member of a structure, be it in one without a name.
    pub(super) fn offset(&self, of: &str, member: &str) -> Option<i16> {
        self.offset_along(of, &[member])
    }

    /// The same of a member of a member, and so on.
    pub(super) fn offset_along(&self, of: &str, path: &[&str]) -> Option<i16> {
        let start = (0, self.find(STRUCT, of)?);
        let (bits, _) = path.iter().try_fold(start, |(bits, of), member| {
            let (offset, is) = self.member_in(of, member, 0)?;
            Some((bits + offset, is))
        })?;
        i16::try_from(bits / 8).ok().filter(|_| bits % 8 == 0)
    }

    /// The offset in bits of a member, and the number of its type.
    fn member_in(&self, number: usize, member: &str, depth: u32) -> Option<(u32, usize)> {
        let place = *self.places.get(number)?;
        if !matches!(self.kind(place), STRUCT | UNION) || depth > 8 {
            return None;
        }
        let count = self.word(place + 4) as usize & 0xffff;
        (0..count).find_map(|index| {
            let at = place + HEADER + index * 12;
            // Bit fields have their length above.
            let offset = self.word(at + 8) & 0xff_ffff;
            let its_type = self.word(at + 4) as usize;
            if self.is_named(at, member) {
                return Some((offset, its_type));
            }
            let inside = self.is_named(at, "").then_some(its_type)?;
            let (further, its_type) = self.member_in(inside, member, depth + 1)?;
            Some((offset + further, its_type))
        })
    }
}
