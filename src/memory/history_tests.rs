//! Random histories against a model that remembers everything.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::memory::PAGE;
use crate::memory::page_store::PageStore;
use crate::memory::ranges::Span;

const PAGES: u64 = 48;

#[derive(Debug, Clone)]
enum Act {
    /// Writes to pages, which there are then.
    Write(u64, u64),
    /// Drops pages.
    Drop(u64, u64),
    /// A checkpoint; if it need not be a full one it is not.
    Take(bool),
    /// A checkpoint that fails after the pages are armed.
    Fail,
    Rollback(usize),
    Release(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let span = (0..PAGES, 1..8u64);
    prop_oneof![
        6 => span.clone().prop_map(|(start, len)| Act::Write(start, (start + len).min(PAGES))),
        2 => span.prop_map(|(start, len)| Act::Drop(start, (start + len).min(PAGES))),
        4 => (0..5).prop_map(|full| Act::Take(full == 0)),
        1 => Just(Act::Fail),
        4 => any::<usize>().prop_map(Act::Rollback),
        2 => any::<usize>().prop_map(Act::Release),
    ]
}

/// An address space: what is on each page, if there is one.
type Memory = BTreeMap<u64, u64>;

struct Node {
    /// What it has to be.
    memory: Memory,
    /// What is kept of it.
    base: u64,
    pages: PageMap,
    populated: Ranges,
}

#[derive(Default)]
struct Model {
    live: Memory,
    /// Pages written or dropped since the tracking was armed.
    written: BTreeSet<u64>,
    counter: u64,
    nodes: Vec<Node>,
    /// What the shadows have, and the slots.
    shadows: BTreeMap<u64, Memory>,
    slots: BTreeMap<u32, u64>,
    store: PageStore,
    history: History,
}

fn ranges<'a>(pages: impl IntoIterator<Item = &'a u64>) -> Ranges {
    let spans = pages.into_iter().map(|page| Span {
        start: page * PAGE,
        end: (page + 1) * PAGE,
    });
    spans.collect()
}

fn numbers(ranges: &Ranges) -> Vec<u64> {
    ranges.pieces(PAGE).map(|span| span.start / PAGE).collect()
}

impl Model {
    fn populated(&self) -> Ranges {
        ranges(self.live.keys())
    }

    fn state(&self, base: u64, pages: PageMap) -> State {
        State {
            base,
            pages,
            populated: self.populated(),
            layout: Layout::default(),
        }
    }

    fn take(&mut self, full: bool) {
        let populated = self.populated();
        let written = ranges(&self.written);
        let stale = self.history.stale();
        let now = self.history.now().map(|now| {
            let changed = written
                .union(&stale)
                .union(&populated.difference(&now.populated))
                .intersection(&populated);
            let gone = now.populated.difference(&populated);
            (now.base, now.pages.clone(), changed, gone)
        });
        self.history.armed(&written);
        self.written.clear();
        match now.filter(|_| !full) {
            Some((base, mut pages, changed, gone)) => {
                // What went before a failure need not be in the written set any more.
                let gone = gone.union(&stale.difference(&populated));
                pages.clear(&gone);
                for page in numbers(&changed) {
                    let slot = self.store.take(1).unwrap()[0].0;
                    self.slots.insert(slot, self.live[&page]);
                    pages.set(page * PAGE, slot);
                }
                self.history.settle(self.state(base, pages.clone()));
                self.push(base, pages);
            }
            None => {
                self.counter += 1;
                let base = self.counter;
                self.shadows.insert(base, self.live.clone());
                let pages = PageMap::new(self.store.clone());
                let changed = written.union(&stale);
                let went = self.history.now().map(|now| {
                    let come = populated.difference(&now.populated);
                    now.populated.difference(&populated).union(&come)
                });
                let changed = changed.union(&went.unwrap_or_default());
                self.history
                    .rebase(self.state(base, pages.clone()), &changed);
                self.push(base, pages);
            }
        }
    }

    fn push(&mut self, base: u64, pages: PageMap) {
        assert!(pages.unknown().is_empty());
        self.nodes.push(Node {
            memory: self.live.clone(),
            base,
            pages,
            populated: self.populated(),
        });
    }

    /// What a node has, as it is kept.
    fn read(&self, node: &Node, page: u64) -> u64 {
        match node.pages.get(page * PAGE) {
            Some(slot) => self.slots[&slot],
            None => self.shadows[&node.base][&page],
        }
    }

    fn rollback(&mut self, to: usize) {
        let node = &self.nodes[to];
        let stale = self
            .history
            .differing(node.base, &node.pages, &node.populated);
        let stale = stale.unwrap_or_else(|| node.populated.union(&self.populated()));
        let suspect = ranges(&self.written).union(&stale);
        let mut live = self.live.clone();
        for page in numbers(&suspect) {
            match node.populated.contains(page * PAGE) {
                true => live.insert(page, self.read(node, page)),
                false => live.remove(&page),
            };
        }
        assert_eq!(live, node.memory);
        for (page, value) in &node.memory {
            assert_eq!(self.read(node, *page), *value, "page {page}");
        }
        let (base, pages) = (node.base, node.pages.clone());
        self.live = live;
        self.written.clear();
        self.history.settle(self.state(base, pages));
    }

    fn release(&mut self, which: usize) {
        let node = self.nodes.remove(which);
        let base = node.base;
        drop(node);
        if !self.nodes.iter().any(|node| node.base == base) {
            self.shadows.remove(&base);
            self.history.forget_base(base);
        }
        self.history.forget_pages();
    }

    /// Nothing is kept that no node has.
    fn check(&self) {
        let mut had = BTreeSet::new();
        for node in &self.nodes {
            node.pages.each_in(Span::ALL, |_, slot| {
                had.insert(slot);
            });
        }
        assert_eq!(self.store.bytes(), had.len() as u64 * PAGE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_node_is_reached_from_anywhere(acts in proptest::collection::vec(act(), 0..60)) {
        let mut model = Model::default();
        for act in acts {
            match act {
                Act::Write(start, end) => for page in start..end {
                    model.counter += 1;
                    model.live.insert(page, model.counter);
                    model.written.insert(page);
                },
                Act::Drop(start, end) => for page in start..end {
                    model.live.remove(&page);
                    model.written.insert(page);
                },
                Act::Take(full) => model.take(full),
                Act::Fail => {
                    let written = ranges(&model.written);
                    model.history.armed(&written);
                    model.written.clear();
                }
                Act::Rollback(to) if !model.nodes.is_empty() => model.rollback(to % model.nodes.len()),
                Act::Release(which) if !model.nodes.is_empty() => {
                    model.release(which % model.nodes.len());
                    model.check();
                }
                Act::Rollback(_) | Act::Release(_) => {}
            }
        }
        for to in 0..model.nodes.len() {
            model.rollback(to);
        }
        while !model.nodes.is_empty() {
            model.release(0);
            model.check();
        }
    }
}
