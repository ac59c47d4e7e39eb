//! The page store: pre-images of pages, in the part of a window that keeper and target share.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::PAGE;
use super::ranges::{Ranges, Span};

/// Hashes page numbers: one multiplication mixes them enough.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("pages are hashed by their number")
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (value >> 12)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(32);
    }
}

/// Which pages of an address space, as of one checkpoint, are in the store, and in which slot.
pub(super) type Slots = HashMap<u64, u32, BuildHasherDefault<PageHasher>>;

/// Gives out the slots of a store, a page each.
#[derive(Debug)]
pub(super) struct Store {
    capacity: u32,
    unused: u32,
    free: Vec<u32>,
}

impl Store {
    /// An empty store of `bytes` bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            capacity: (bytes as u64 / PAGE) as u32,
            unused: 0,
            free: Vec::new(),
        }
    }

    /// A slot, or `None` if the store is full. Consecutive calls on a fresh store give consecutive slots.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.unused < self.capacity {
            self.unused += 1;
            return Some(self.unused - 1);
        }
        self.free.pop()
    }

    /// Number of slots that can be taken.
    pub(super) fn room(&self) -> u64 {
        u64::from(self.capacity - self.unused) + self.free.len() as u64
    }

    /// Gives a slot back.
    pub(super) fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Bytes of slots in use.
    pub(super) fn bytes(&self) -> u64 {
        (u64::from(self.unused) - self.free.len() as u64) * PAGE
    }
}

/// A run of pages whose slots are consecutive too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The pages.
    pub(super) span: Span,
    /// The slot of the first.
    pub(super) slot: u32,
}

/// Cuts pages that all have slots into runs. Pages that have none are returned as the second value.
pub(super) fn runs(pages: &Ranges, slots: &Slots) -> (Vec<Run>, Ranges) {
    let mut runs: Vec<Run> = Vec::new();
    let mut missing = Ranges::new();
    for span in pages.spans() {
        let mut at = span.start;
        while at < span.end {
            let page = Span {
                start: at,
                end: at + PAGE,
            };
            match slots.get(&at) {
                None => missing.push(page),
                Some(&slot) => match runs.last_mut() {
                    Some(run)
                        if run.span.end == at
                            && u64::from(run.slot) + run.span.len() / PAGE == u64::from(slot) =>
                    {
                        run.span.end = page.end;
                    }
                    _ => runs.push(Run { span: page, slot }),
                },
            }
            at += PAGE;
        }
    }
    (runs, missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_run() {
        let pages = Ranges::from_iter([Span {
            start: 0x1000,
            end: 0x5000,
        }]);
        let slots: Slots = [(0x1000, 7), (0x2000, 8), (0x4000, 3)]
            .into_iter()
            .collect();
        let (runs, missing) = runs(&pages, &slots);
        assert_eq!(
            runs[0],
            Run {
                span: Span {
                    start: 0x1000,
                    end: 0x3000
                },
                slot: 7
            }
        );
        assert_eq!(
            runs[1],
            Run {
                span: Span {
                    start: 0x4000,
                    end: 0x5000
                },
                slot: 3
            }
        );
        assert_eq!(
            missing.spans(),
            [Span {
                start: 0x3000,
                end: 0x4000
            }]
        );
    }

    #[test]
    fn a_full_store_says_so() {
        let mut store = Store::new(2 * PAGE as usize);
        assert_eq!(
            (store.take(), store.take(), store.take()),
            (Some(0), Some(1), None)
        );
        store.give_back(1);
        assert_eq!(store.room(), 1);
        assert_eq!(store.take(), Some(1));
        assert_eq!(store.room(), 0);
        assert_eq!(store.bytes(), 2 * PAGE);
    }
}
