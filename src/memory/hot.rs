//! Whether the pages that a rollback has put back are armed again. Pure.
//!
//! A page that is left unarmed counts as written at the next rollback and is put back whether it was or not. That is
//! cheaper than arming it and the fault of the program's next write to it, if the program does write to it, as most do to
//! much the same pages each time. So when two rollbacks after each other have found much the same number, pages stay
//! unarmed as long as their number does not grow, which it does if others are written each time; and now and then all are
//! armed, since nothing else tells of pages that are not written any more.

/// What the last rollbacks of an address space have seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hot {
    /// Pages found written by the last rollback before which all were armed.
    last: Option<u64>,
    /// As many were first left unarmed; 0: all are armed.
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
        if self.first == 0 {
            let alike = self
                .last
                .is_some_and(|last| !is_more(pages, last) && !is_more(last, pages));
            self.last = Some(pages);
            if self.pause > 0 {
                self.pause -= 1;
            } else if alike {
                (self.first, self.rounds) = (pages, 1);
                return true;
            }
            return false;
        }
        self.rounds += 1;
        if is_more(pages, self.first) {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2 + 1).min(MOST_PAUSE);
        } else if self.rounds > MOST_ROUNDS {
            self.next_pause = 0;
        } else {
            return true;
        }
        self.last = Some(self.first);
        self.first = 0;
        false
    }

    /// All is armed, by a checkpoint.
    pub(super) fn all_armed(&mut self) {
        *self = Self::default();
    }
}

fn is_more(pages: u64, than: u64) -> bool {
    pages > than + than / 4 + 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_pages_are_armed_seldom() {
        let mut hot = Hot::default();
        let armed = (0..341).filter(|_| !hot.leaves(1000)).count();
        assert_eq!(armed, 21);
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
    fn one_great_change_is_armed_at_once() {
        let mut hot = Hot::default();
        assert!(!hot.leaves(26_000));
        assert!(!hot.leaves(10), "fewer: that was once");
        assert!(hot.leaves(12));
    }

    #[test]
    fn fewer_pages_are_noticed() {
        let mut hot = Hot::default();
        assert!(!hot.leaves(10_000) && hot.leaves(10_000));
        let until = (0..100).position(|_| !hot.leaves(10_000));
        assert_eq!(until, Some(MOST_ROUNDS as usize - 1));
        assert!(!hot.leaves(10), "fewer than before");
        assert!(hot.leaves(10));
        assert!(!hot.leaves(10_000), "that is growth now");
    }
}
