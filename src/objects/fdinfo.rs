//! `/proc/PID/fdinfo/N` (proc_pid_fdinfo(5)): the kernel's own account of a descriptor, as text.

use std::str::FromStr;

use super::Error;

/// The text of one descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fdinfo {
    path: String,
    text: String,
}

impl Fdinfo {
    /// Reads that of a descriptor.
    pub fn read(pid: i32, fd: i32) -> Result<Self, Error> {
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Self { path, text }),
            Err(error) => Err(Error::Text {
                path,
                problem: error.to_string(),
            }),
        }
    }

    #[cfg(test)]
    pub(crate) fn of(text: &str) -> Self {
        Self {
            path: "test".into(),
            text: text.into(),
        }
    }

    fn bad(&self, problem: String) -> Error {
        Error::Text {
            path: self.path.clone(),
            problem,
        }
    }

    /// The rest of each line that begins with `name:`, trimmed.
    pub fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.text
            .lines()
            .filter_map(move |line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    }

    /// The lines that begin with this word, whole; for kinds whose lines have no `name:` of their own (inotify).
    pub fn lines_of<'a>(&'a self, word: &'a str) -> impl Iterator<Item = &'a str> {
        self.text
            .lines()
            .filter(move |line| line.split_whitespace().next() == Some(word))
    }

    /// The value of a field there must be.
    pub fn field<'a>(&'a self, name: &'a str) -> Result<&'a str, Error> {
        self.lines(name)
            .next()
            .ok_or_else(|| self.bad(format!("no field {name}")))
    }

    /// Whether there is such a field.
    pub fn has(&self, name: &str) -> bool {
        self.lines(name).next().is_some()
    }

    /// A decimal field.
    pub fn number<T: FromStr>(&self, name: &str) -> Result<T, Error> {
        let text = self.field(name)?;
        text.parse()
            .map_err(|_| self.bad(format!("{name} is {text:?}, not a number")))
    }

    /// A hexadecimal field.
    pub fn hexadecimal(&self, name: &str) -> Result<u64, Error> {
        let text = self.field(name)?;
        u64::from_str_radix(text, 16)
            .map_err(|_| self.bad(format!("{name} is {text:?}, not hexadecimal")))
    }

    /// An octal field, as `flags`.
    pub fn octal(&self, name: &str) -> Result<u64, Error> {
        let text = self.field(name)?;
        u64::from_str_radix(text, 8).map_err(|_| self.bad(format!("{name} is {text:?}, not octal")))
    }

    /// A pair `(a, b)` of decimal numbers, as in timerfd's `it_value`.
    pub fn pair(&self, name: &str) -> Result<(u64, u64), Error> {
        let text = self.field(name)?;
        let parse = || {
            let (a, b) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
            Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
        };
        parse().ok_or_else(|| self.bad(format!("{name} is {text:?}, not a pair")))
    }

    /// The values of `key:value` words in a line, as `pos:0 ino:3a sdev:8`; a space may stand after the colon.
    pub fn word<'a>(&self, line: &'a str, key: &str) -> Result<&'a str, Error> {
        let mut rest = line;
        while let Some(at) = rest.find(key) {
            let starts = at == 0 || rest.as_bytes()[at - 1].is_ascii_whitespace();
            let after = &rest[at + key.len()..];
            if let (true, Some(value)) = (starts, after.strip_prefix(':')) {
                return value
                    .split_whitespace()
                    .next()
                    .ok_or_else(|| self.bad(format!("{key} without value in {line:?}")));
            }
            rest = after;
        }
        Err(self.bad(format!("no {key} in {line:?}")))
    }

    /// The same as a number in this radix.
    pub fn word_number(&self, line: &str, key: &str, radix: u32) -> Result<u64, Error> {
        let word = self.word(line, key)?;
        u64::from_str_radix(word, radix)
            .map_err(|_| self.bad(format!("{key} is {word:?} in {line:?}, not a number")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_fields_of_every_shape() {
        let info = Fdinfo::of(
            "pos:\t12\nflags:\t02004002\nmnt_id:\t15\nino:\t1057\n\
             tfd:       12 events:       1d data: ffffffffffffffff  pos:0 ino:2d1 sdev:f\n\
             it_value: (2, 985555)\ninotify wd:1 ino:62f sdev:800013 mask:800afce ignored_mask:0\n",
        );
        assert_eq!(info.number::<i64>("pos").unwrap(), 12);
        assert_eq!(info.octal("flags").unwrap(), 0o2004002);
        assert_eq!(info.pair("it_value").unwrap(), (2, 985_555));
        let line = info.lines("tfd").next().unwrap();
        assert_eq!(line.split_whitespace().next(), Some("12"));
        assert_eq!(info.word(line, "events").unwrap(), "1d");
        assert_eq!(info.word_number(line, "data", 16).unwrap(), u64::MAX);
        assert_eq!(info.word_number(line, "ino", 16).unwrap(), 0x2d1);
        let watch = info.lines_of("inotify").next().unwrap();
        assert_eq!(info.word_number(watch, "mask", 16).unwrap(), 0x0800_afce);
        assert_eq!(info.word_number(watch, "wd", 16).unwrap(), 1);
        assert!(info.field("clockid").is_err());
    }
}
