//! What is known of how the states of an address space differ, without looking at any page. Pure.
//!
//! A state is one that a checkpoint has: pages that are in a shadow (its *base*), but for those that are kept by copy. The
//! live address space was equal to one of them last, when that was taken or rolled back to; what was written since, the
//! kernel tells. So the pages in which it may differ from any other state are those and what differs between the two.

use std::collections::BTreeMap;

use super::layout::Layout;
use super::page_map::PageMap;
use super::ranges::Ranges;

/// A state.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// Names the shadow.
    pub(super) base: u64,
    /// Pages that are kept by copy.
    pub(super) pages: PageMap,
    /// Pages that are there.
    pub(super) populated: Ranges,
    /// The VMAs.
    pub(super) layout: Layout,
}

/// What an address space has been.
#[derive(Debug, Default)]
pub(super) struct History {
    /// What it was equal to last.
    now: Option<State>,
    /// The shadow of that is gone: nothing can be built on it.
    is_adrift: bool,
    /// Pages that may differ from that though they were not written since the tracking was last armed.
    pending: Ranges,
    /// Of the shadows that it has besides that of `now`: pages that differ from those of that, perhaps.
    bases: BTreeMap<u64, Ranges>,
}

impl History {
    /// What it was equal to last, if that can be built on.
    pub(super) fn now(&self) -> Option<&State> {
        self.now.as_ref().filter(|_| !self.is_adrift)
    }

    /// Pages that may differ from what it was equal to last though they were not written since the tracking was last armed.
    pub(super) fn stale(&self) -> Ranges {
        let unknown = self.now.as_ref().map(|now| now.pages.unknown());
        self.pending.union(&unknown.unwrap_or_default())
    }

    /// These were written, and are armed again.
    pub(super) fn armed(&mut self, written: &Ranges) {
        self.pending = self.pending.union(written);
    }

    /// Pages that may differ from a state though they were not written since the tracking was last armed; `None`: any may.
    pub(super) fn differing(
        &self,
        base: u64,
        pages: &PageMap,
        populated: &Ranges,
    ) -> Option<Ranges> {
        let now = self.now.as_ref()?;
        let kept = match now.base == base {
            true => now.pages.differences(pages),
            false => self
                .bases
                .get(&base)?
                .union(&now.pages.pages())
                .union(&pages.pages()),
        };
        let came = now.populated.difference(populated);
        let went = populated.difference(&now.populated);
        Some(kept.union(&came).union(&went).union(&self.pending))
    }

    /// A new state was made with a shadow of its own, in which these pages may differ from what it was before.
    pub(super) fn rebase(&mut self, state: State, changed: &Ranges) {
        if let Some(now) = self.now.take() {
            let differing = changed.union(&now.pages.pages());
            self.moved(now.base, differing);
        }
        self.arrive(state);
    }

    /// It is equal to a state, whose base is known or the same as before.
    pub(super) fn settle(&mut self, state: State) {
        if let Some(now) = &self.now
            && now.base != state.base
        {
            let was = now.base;
            match self.bases.remove(&state.base) {
                Some(between) => self.moved(was, between),
                None => self.bases.clear(),
            }
        }
        self.arrive(state);
    }

    /// It goes to another base, which differs in these pages from the one it was on.
    fn moved(&mut self, was: u64, differing: Ranges) {
        self.bases
            .values_mut()
            .for_each(|of| *of = of.union(&differing));
        if !self.is_adrift {
            self.bases.insert(was, differing);
        }
    }

    fn arrive(&mut self, state: State) {
        self.now = Some(state);
        self.is_adrift = false;
        self.pending = Ranges::new();
    }

    /// A shadow is gone.
    pub(super) fn forget_base(&mut self, base: u64) {
        self.bases.remove(&base);
        self.is_adrift |= self.now.as_ref().is_some_and(|now| now.base == base);
    }

    /// A checkpoint was dropped: what only it had is let go, if it was equal to that last.
    pub(super) fn forget_pages(&mut self) {
        if let Some(now) = &mut self.now {
            now.pages.forget();
        }
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
