//! How much each kind takes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Kind;

/// Records of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindStats {
    /// How many.
    pub records: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Bytes in the image: payload, padding and frame header.
    pub bytes: u64,
}

/// Counts and bytes by kind. Its `Display` is a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Records in all, the framing's own included.
    pub records: u64,
    /// Bytes of the image so far.
    pub bytes: u64,
    /// By kind; kinds without records are absent.
    pub by_kind: BTreeMap<Kind, KindStats>,
}

impl Stats {
    pub(super) fn add(&mut self, kind: Kind, payload_bytes: u64, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
        let entry = self.by_kind.entry(kind).or_default();
        entry.records += 1;
        entry.payload_bytes += payload_bytes;
        entry.bytes += bytes;
    }

    /// The headers' part, in percent, of a total of headers and `resident` bytes of memory kept copy-on-write.
    #[must_use]
    pub fn percent_of_total(&self, resident: u64) -> f64 {
        let total = self.bytes.saturating_add(resident);
        if total == 0 {
            0.0
        } else {
            self.bytes as f64 * 100.0 / total as f64
        }
    }

    /// The table with a last line that says how much of the total the headers are.
    #[must_use]
    pub fn against(&self, resident: u64) -> String {
        let percent = self.percent_of_total(resident);
        format!(
            "{self}\nheaders are {percent:.3}% of headers and {resident} bytes of resident memory"
        )
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<18} {:>8} {:>12} {:>12} {:>7}",
            "kind", "records", "payload", "bytes", "share"
        )?;
        for (kind, stats) in &self.by_kind {
            let share = if self.bytes == 0 {
                0.0
            } else {
                stats.bytes as f64 * 100.0 / self.bytes as f64
            };
            let KindStats {
                records,
                payload_bytes,
                bytes,
            } = stats;
            writeln!(
                f,
                "{kind:<18} {records:>8} {payload_bytes:>12} {bytes:>12} {share:>6.1}%"
            )?;
        }
        let payload: u64 = self.by_kind.values().map(|stats| stats.payload_bytes).sum();
        write!(
            f,
            "{:<18} {:>8} {payload:>12} {:>12} {:>6.1}%",
            "all", self.records, self.bytes, 100.0
        )
    }
}
