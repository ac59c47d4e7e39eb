//! The time each phase of an operation took: one type that reports, logs and benches all read.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A stopwatch that is read at the end of each phase.
#[derive(Debug, Clone)]
pub struct Phases {
    start: Instant,
    last: Instant,
    spent: BTreeMap<&'static str, Duration>,
    running: Duration,
}

impl Phases {
    /// Starts it.
    pub fn start() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            last: now,
            spent: BTreeMap::new(),
            running: Duration::ZERO,
        }
    }

    /// The phase `name` ends here. A phase may be passed more than once.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        *self.spent.entry(name).or_default() += now - self.last;
        self.last = now;
        tracing::debug!(phase = name, "done");
    }

    /// As [`Phases::end`], of a phase in which nothing is stopped.
    pub fn end_running(&mut self, name: &'static str) {
        let last = self.last;
        self.end(name);
        self.running += self.last - last;
    }

    /// Time from the start to the end of the last phase, without the phases in which nothing is stopped.
    pub fn stopped(&self) -> Duration {
        self.last - self.start - self.running
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.start
    }

    /// Time since the start.
    pub fn total(&self) -> Duration {
        self.start.elapsed()
    }

    /// Microseconds by phase.
    pub fn microseconds(&self) -> BTreeMap<String, u64> {
        self.spent
            .iter()
            .map(|(name, spent)| ((*name).to_owned(), spent.as_micros() as u64))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole() {
        let mut phases = Phases::start();
        phases.end("one");
        phases.end("two");
        phases.end("one");
        let spent: Duration = phases.spent.values().sum();
        assert_eq!(spent, phases.last - phases.started());
        assert_eq!(phases.microseconds().len(), 2);
        phases.end_running("three");
        assert_eq!(phases.running, phases.spent["three"]);
        assert!(phases.stopped() <= phases.total());
    }
}
