//! Which pages of an address space a checkpoint keeps by copy, and in which slot of the store each is.
//!
//! A map is a tree that is never changed once it is shared: a checkpoint that differs from its parent in few pages has
//! all but the paths to these in common with it, be it the thousandth of a chain. So a copy costs nothing, a page is
//! found in six steps, and what differs between two maps, wherever their checkpoints are in the tree, is found by looking
//! at what they do not share.

use std::sync::Arc;

use super::PAGE;
use super::page_store::PageStore;
use super::ranges::{Ranges, Span};

/// Bits of a page number that a leaf and an inner node stand for; together with [`DEPTH`] inner levels those of user addresses.
const LEAF_BITS: u32 = 5;
const INNER_BITS: u32 = 6;
const LEAF: usize = 1 << LEAF_BITS;
const INNER: usize = 1 << INNER_BITS;

/// In place of a slot: no page.
const NONE: u32 = 0;
/// In place of a slot: something that is not known any more, and is like nothing else.
const UNKNOWN: u32 = u32::MAX;

/// A node of the tree; `page` are numbers of pages relative to its first.
trait Node: Clone {
    /// Bits of a page number that it stands for.
    const BITS: u32;
    fn empty(store: &PageStore) -> Self;
    /// Sets slots in `[start, end)`, and returns by how much the number of those that are set grows.
    fn set(&mut self, page: u64, slot: u32, store: &PageStore) -> isize;
    /// Removes the slots of `[start, end)` and returns how many there were.
    fn clear(&mut self, start: u64, end: u64) -> usize;
    fn each(&self, first: u64, each: &mut impl FnMut(u64, u32));
    /// The pages of `[start, end)` that have a slot, or do not, in runs: `first` is the number of its first page.
    fn each_in(&self, first: u64, start: u64, end: u64, each: &mut impl FnMut(u64, u32));
    /// Where it differs from another. `None` is an empty node.
    fn differences(
        one: Option<&Arc<Self>>,
        other: Option<&Arc<Self>>,
        first: u64,
        found: &mut Ranges,
    );
    /// Gives back slots that nobody else has, and leaves [`UNKNOWN`] there.
    fn forget(this: &mut Arc<Self>, store: &PageStore);
}

#[derive(Debug)]
struct Leaf {
    slots: [u32; LEAF],
    store: PageStore,
}

impl Leaf {
    fn real(&self) -> impl Iterator<Item = u32> {
        let slots = self.slots.iter().copied();
        slots.filter(|slot| !matches!(*slot, NONE | UNKNOWN))
    }
}

impl Clone for Leaf {
    fn clone(&self) -> Self {
        self.store.share(self.real());
        Self {
            slots: self.slots,
            store: self.store.clone(),
        }
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        self.store.give_back(self.real());
    }
}

impl Node for Leaf {
    const BITS: u32 = LEAF_BITS;

    fn empty(store: &PageStore) -> Self {
        Self {
            slots: [NONE; LEAF],
            store: store.clone(),
        }
    }

    fn set(&mut self, page: u64, slot: u32, _: &PageStore) -> isize {
        let was = std::mem::replace(&mut self.slots[page as usize], slot);
        if !matches!(was, NONE | UNKNOWN) {
            self.store.give_back([was].into_iter());
        }
        isize::from(slot != NONE) - isize::from(was != NONE)
    }

    fn clear(&mut self, start: u64, end: u64) -> usize {
        let cleared = &mut self.slots[start as usize..end as usize];
        let count = cleared.iter().filter(|slot| **slot != NONE).count();
        let real = cleared.iter().copied();
        self.store
            .give_back(real.filter(|slot| !matches!(*slot, NONE | UNKNOWN)));
        cleared.fill(NONE);
        count
    }

    fn each(&self, first: u64, each: &mut impl FnMut(u64, u32)) {
        self.each_in(first, 0, LEAF as u64, each);
    }

    fn each_in(&self, first: u64, start: u64, end: u64, each: &mut impl FnMut(u64, u32)) {
        for page in start..end {
            let slot = self.slots[page as usize];
            if slot != NONE {
                each(first + page, slot);
            }
        }
    }

    fn differences(
        one: Option<&Arc<Self>>,
        other: Option<&Arc<Self>>,
        first: u64,
        found: &mut Ranges,
    ) {
        let slot = |of: Option<&Arc<Self>>, page: usize| of.map_or(NONE, |leaf| leaf.slots[page]);
        for page in 0..LEAF {
            let (one, other) = (slot(one, page), slot(other, page));
            if one != other || one == UNKNOWN {
                found.push(span(first + page as u64));
            }
        }
    }

    fn forget(this: &mut Arc<Self>, store: &PageStore) {
        let Some(leaf) = Arc::get_mut(this) else {
            return;
        };
        for slot in &mut leaf.slots {
            if !matches!(*slot, NONE | UNKNOWN) && store.count(*slot) == 1 {
                store.give_back([*slot].into_iter());
                *slot = UNKNOWN;
            }
        }
    }
}

#[derive(Debug)]
struct Inner<C> {
    children: [Option<Arc<C>>; INNER],
}

impl<C> Clone for Inner<C> {
    fn clone(&self) -> Self {
        Self {
            children: self.children.clone(),
        }
    }
}

impl<C: Node> Inner<C> {
    /// The child that has a page, and the page in it.
    fn place(page: u64) -> (usize, u64) {
        ((page >> C::BITS) as usize, page & ((1 << C::BITS) - 1))
    }

    /// The children that have pages of `[start, end)`: number, first page, and the part of each.
    fn parts(start: u64, end: u64) -> impl Iterator<Item = (usize, u64, u64, u64)> {
        let size = 1u64 << C::BITS;
        (start >> C::BITS..end.div_ceil(size)).map(move |index| {
            let first = index * size;
            let (from, to) = (start.max(first) - first, end.min(first + size) - first);
            (index as usize, first, from, to)
        })
    }
}

impl<C: Node> Node for Inner<C> {
    const BITS: u32 = C::BITS + INNER_BITS;

    fn empty(_: &PageStore) -> Self {
        Self {
            children: [const { None }; INNER],
        }
    }

    fn set(&mut self, page: u64, slot: u32, store: &PageStore) -> isize {
        let (index, page) = Self::place(page);
        let child = self.children[index].get_or_insert_with(|| Arc::new(C::empty(store)));
        Arc::make_mut(child).set(page, slot, store)
    }

    fn clear(&mut self, start: u64, end: u64) -> usize {
        let mut cleared = 0;
        for (index, _, from, to) in Self::parts(start, end) {
            let child = &mut self.children[index];
            match child {
                None => continue,
                Some(shared) if to - from < 1 << C::BITS => {
                    let mut any = false;
                    shared.each_in(0, from, to, &mut |_, _| any = true);
                    if any {
                        cleared += Arc::make_mut(shared).clear(from, to);
                    }
                }
                Some(whole) => {
                    whole.each(0, &mut |_, _| cleared += 1);
                    *child = None;
                }
            }
        }
        cleared
    }

    fn each(&self, first: u64, each: &mut impl FnMut(u64, u32)) {
        self.each_in(first, 0, 1 << Self::BITS, each);
    }

    fn each_in(&self, first: u64, start: u64, end: u64, each: &mut impl FnMut(u64, u32)) {
        for (index, begin, from, to) in Self::parts(start, end) {
            if let Some(child) = &self.children[index] {
                child.each_in(first + begin, from, to, each);
            }
        }
    }

    fn differences(
        one: Option<&Arc<Self>>,
        other: Option<&Arc<Self>>,
        first: u64,
        found: &mut Ranges,
    ) {
        for index in 0..INNER {
            let child = |of: Option<&'_ Arc<Self>>| -> Option<Arc<C>> {
                of.and_then(|node| node.children[index].clone())
            };
            let (one, other) = (child(one), child(other));
            let is_same = match (&one, &other) {
                (None, None) => true,
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                _ => false,
            };
            if !is_same {
                let first = first + ((index as u64) << C::BITS);
                C::differences(one.as_ref(), other.as_ref(), first, found);
            }
        }
    }

    fn forget(this: &mut Arc<Self>, store: &PageStore) {
        let Some(node) = Arc::get_mut(this) else {
            return;
        };
        for child in node.children.iter_mut().flatten() {
            C::forget(child, store);
        }
    }
}

/// All pages below 2^47.
type Root = Inner<Inner<Inner<Inner<Inner<Leaf>>>>>;
const _: () = assert!(<Root as Node>::BITS == 35);

/// The pages and their slots.
#[derive(Debug, Clone)]
pub(super) struct PageMap {
    root: Arc<Root>,
    len: usize,
    store: PageStore,
}

fn span(page: u64) -> Span {
    Span {
        start: page * PAGE,
        end: (page + 1) * PAGE,
    }
}

impl PageMap {
    /// No pages of a store.
    pub(super) fn new(store: PageStore) -> Self {
        Self {
            root: Arc::new(Root::empty(&store)),
            len: 0,
            store,
        }
    }

    /// The store that its slots are of.
    pub(super) fn store(&self) -> &PageStore {
        &self.store
    }

    /// Number of pages.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The slot of the page at an address.
    #[cfg(test)]
    pub(super) fn get(&self, address: u64) -> Option<u32> {
        let mut found = None;
        let page = span(address / PAGE);
        self.each_in(page, |_, slot| found = Some(slot));
        found
    }

    /// Gives the page at an address a slot of the store, whose count it takes over.
    pub(super) fn set(&mut self, address: u64, slot: u32) {
        let grown = Arc::make_mut(&mut self.root).set(address / PAGE, slot, &self.store);
        self.len = self.len.saturating_add_signed(grown);
    }

    /// Takes out pages.
    pub(super) fn clear(&mut self, pages: &Ranges) {
        for span in pages.spans() {
            let mut any = false;
            self.each_in(*span, |_, _| any = true);
            if any {
                let (start, end) = (span.start / PAGE, span.end / PAGE);
                self.len -= Arc::make_mut(&mut self.root).clear(start, end);
            }
        }
    }

    /// Gives `each` the addresses and slots of the pages in a span, in order.
    pub(super) fn each_in(&self, span: Span, mut each: impl FnMut(u64, u32)) {
        let (start, end) = (span.start / PAGE, span.end.div_ceil(PAGE));
        let end = end.min(1 << <Root as Node>::BITS);
        if start < end {
            self.root
                .each_in(0, start, end, &mut |page, slot| each(page * PAGE, slot));
        }
    }

    /// All pages.
    pub(super) fn pages(&self) -> Ranges {
        let mut pages = Ranges::new();
        self.root.each(0, &mut |page, _| pages.push(span(page)));
        pages
    }

    /// The pages in which it differs from another of the same store.
    pub(super) fn differences(&self, other: &Self) -> Ranges {
        let mut found = Ranges::new();
        if !Arc::ptr_eq(&self.root, &other.root) {
            Root::differences(Some(&self.root), Some(&other.root), 0, &mut found);
        }
        found
    }

    /// Pages of which only is known that they are like nothing else.
    pub(super) fn unknown(&self) -> Ranges {
        let mut pages = Ranges::new();
        self.root.each(0, &mut |page, slot| {
            if slot == UNKNOWN {
                pages.push(span(page));
            }
        });
        pages
    }

    /// Gives back what nobody else has; of those pages only is known from then on that they are like nothing else.
    pub(super) fn forget(&mut self) {
        Root::forget(&mut self.root, &self.store);
    }
}

#[cfg(test)]
#[path = "page_map_tests.rs"]
mod tests;
