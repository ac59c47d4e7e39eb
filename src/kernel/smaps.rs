//! `VmFlags` of `/proc/PID/smaps` (proc_pid_smaps(5)): what mmap and madvise have set on a VMA.

/// The flags of one VMA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// First address of the VMA.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    flags: Vec<[u8; 2]>,
}

impl Flags {
    /// The same of another VMA.
    #[must_use]
    pub fn at(self, start: u64, end: u64) -> Self {
        Self { start, end, ..self }
    }

    /// Without some flags.
    #[must_use]
    pub fn without(mut self, flags: &[&str]) -> Self {
        self.flags
            .retain(|of| !flags.iter().any(|flag| flag.as_bytes() == of));
        self
    }

    /// Whether the two-letter flag is set.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|of| of == flag.as_bytes())
    }
}

/// Parses the text of an smaps file; what is not understood is passed over.
pub fn parse(text: &str) -> Vec<Flags> {
    let mut found: Vec<Flags> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = found.last_mut() {
                last.flags = flags
                    .split_ascii_whitespace()
                    .filter_map(|flag| flag.as_bytes().try_into().ok())
                    .collect();
            }
        } else if let Some((start, rest)) = line.split_once('-')
            && let Ok(start) = u64::from_str_radix(start, 16)
            && let Some((end, _)) = rest.split_once(' ')
            && let Ok(end) = u64::from_str_radix(end, 16)
        {
            found.push(Flags {
                start,
                end,
                flags: Vec::new(),
            });
        }
    }
    found
}

/// The text that [`parse`] reads these from.
pub fn text(of: &[Flags]) -> String {
    let lines = of.iter().map(|Flags { start, end, flags }| {
        let flags = flags
            .iter()
            .map(|flag| format!(" {}", String::from_utf8_lossy(flag)));
        format!(
            "{start:x}-{end:x} \nVmFlags:{}\n",
            flags.collect::<String>()
        )
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_our_stack() {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let here = &raw const text as u64;
        let flags = parse(&text);
        let mine = flags
            .iter()
            .find(|flags| flags.start <= here && here < flags.end)
            .unwrap();
        assert!(mine.has("wr") && !mine.has("ex"));
        assert_eq!(parse(&super::text(&flags)), flags);
        let less = mine.clone().without(&["wr"]);
        assert!(!less.has("wr") && less.has("rd"));
    }
}
