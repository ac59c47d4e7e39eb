//! Whether the pages that a rollback has put back are armed again. Pure.
//!
//! A page that is left unarmed counts as written at the next rollback and is put back whether it was or not. That is
//! cheaper than arming it and the fault of the program's next write to it, if the program does write to it, as most do to
//! much the same pages each time. So pages stay unarmed as long as their number does not grow, which it does if others
//! are written each time; and now and then all are armed, since nothing else tells of pages that are not written any more.

/// What the last rollbacks of an address space have seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hot {
    /// Pages found written at the first rollback after all were armed; 0: that has not been.
    first: u64,
    /// Rollbacks since then.
    rounds: u32,
    /// Rollbacks that arm before leaving pages unarmed is tried again.
    pause: u32,
    /// The pause after the next failure.
    next_pause: u32,
}

/// After so many rollbacks all is armed.
const MOST_ROUNDS: u32 = 16;
/// The longest pause.
const MOST_PAUSE: u32 = 64;

impl Hot {
    /// Whether to leave unarmed the `pages` that a rollback has found written, not armed, or gone.
    pub(super) fn leaves(&mut self, pages: u64) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        if self.first == 0 {
            (self.first, self.rounds) = (pages, 1);
            return true;
        }
        self.rounds += 1;
        let has_grown = pages > self.first + self.first / 4 + 8;
        if has_grown {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2 + 1).min(MOST_PAUSE);
        }
        if has_grown || self.rounds > MOST_ROUNDS {
            self.next_pause = if has_grown { self.next_pause } else { 0 };
            self.first = 0;
            return false;
        }
        true
    }

    /// All is armed, by a checkpoint.
    pub(super) fn all_armed(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_pages_are_armed_seldom() {
        let mut hot = Hot::default();
        let armed = (0..340).filter(|_| !hot.leaves(1000)).count();
        assert_eq!(armed, 20);
    }

    #[test]
    fn other_pages_each_time_are_armed_mostly() {
        let mut hot = Hot::default();
        let (mut unarmed, mut left) = (0, 0);
        for _ in 0..1000 {
            if hot.leaves(unarmed + 1000) {
                unarmed += 1000;
                left += 1;
            } else {
                unarmed = 0;
            }
        }
        assert!(left < 30, "{left}");
    }

    #[test]
    fn fewer_pages_are_noticed() {
        let mut hot = Hot::default();
        assert!(hot.leaves(10_000));
        let until = (0..100).position(|_| !hot.leaves(10_000));
        assert_eq!(until, Some(MOST_ROUNDS as usize - 1));
        assert!(hot.leaves(10));
        assert!(!hot.leaves(10_000), "that is growth now");
    }
}
