//! The VMA list of an address space, and how it differs from another.

use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::kernel::maps::{self, Vma};
use crate::kernel::pagemap::{self, Backing, Region, Scan};

use super::ranges::{Ranges, Span};

/// The VMAs of an address space in order, without the window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// The VMAs.
    pub vmas: Vec<Vma>,
    /// Where the window is, in a gap between them.
    pub(super) window: Option<Span>,
}

/// What must be done to a span to make it as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayoutChange {
    /// Nothing was there.
    Unmap(Span),
    /// This was there and is not, or something else is.
    Map(Vma),
    /// The same was there, with these `PROT_*` bits.
    Protect(Span, u8),
}

impl Layout {
    /// Reads the text of a maps file, leaving out `window`. `None`: not that format.
    pub fn parse(text: &[u8], window: Option<Span>) -> Option<Self> {
        let mut vmas = maps::parse(text)?;
        if let Some(window) = window {
            vmas.retain(|vma| vma.start < window.start || vma.end > window.end);
        }
        Some(Self { vmas, window })
    }

    /// The changes that make `now` equal to this, in address order.
    ///
    /// Names of anonymous memory (`[heap]`, `[anon:…]`) do not count, nor does how a span is cut into VMAs.
    pub fn changes_from(&self, now: &Self) -> Vec<LayoutChange> {
        let mut changes = Vec::new();
        let (mut was, mut is) = (self.vmas.iter().peekable(), now.vmas.iter().peekable());
        let mut at = 0;
        loop {
            while was.next_if(|vma| vma.end <= at).is_some() {}
            while is.next_if(|vma| vma.end <= at).is_some() {}
            let edges = [was.peek(), is.peek()].into_iter().flatten();
            let Some(to) = edges
                .map(|vma| if vma.start > at { vma.start } else { vma.end })
                .min()
            else {
                return changes;
            };
            let span = Span { start: at, end: to };
            let before = was.peek().copied().filter(|vma| vma.start <= at);
            let after = is.peek().copied().filter(|vma| vma.start <= at);
            match (before, after) {
                (None, None) => {}
                (None, Some(_)) => changes.push(LayoutChange::Unmap(span)),
                (Some(before), None) => changes.push(LayoutChange::Map(part(before, span))),
                (Some(before), Some(after)) if !same_backing(before, after) => {
                    changes.push(LayoutChange::Map(part(before, span)));
                }
                (Some(before), Some(after)) if before.prot != after.prot => {
                    changes.push(LayoutChange::Protect(span, before.prot));
                }
                (Some(_), Some(_)) => {}
            }
            at = to;
        }
    }

    /// The VMA that holds an address.
    pub fn at(&self, address: u64) -> Option<&Vma> {
        let index = self.vmas.partition_point(|vma| vma.end <= address);
        self.vmas.get(index).filter(|vma| vma.start <= address)
    }

    /// The VMAs whose private pages are kept: neither shared nor the kernel's own.
    pub fn private(&self) -> impl Iterator<Item = &Vma> {
        self.vmas.iter().filter(|vma| is_private(vma))
    }

    /// The private VMAs in runs that no other VMA interrupts.
    pub fn private_runs(&self) -> impl Iterator<Item = &[Vma]> {
        self.runs(is_private)
    }

    /// Runs of private VMAs for which `key` says the same, without the window between them.
    fn runs<K: PartialEq>(&self, key: impl Fn(&Vma) -> K) -> impl Iterator<Item = &[Vma]> {
        let is_window_between = move |one: &Vma, next: &Vma| {
            let inside = |window: &Span| one.end <= window.start && window.start < next.start;
            self.window.as_ref().is_some_and(inside)
        };
        let alike = move |one: &Vma, next: &Vma| {
            is_private(one) == is_private(next)
                && key(one) == key(next)
                && !is_window_between(one, next)
        };
        self.vmas
            .chunk_by(alike)
            .filter(|run| run.first().is_some_and(is_private))
    }

    /// Scans the private VMAs in a span, in as few calls as there are others between them.
    pub fn scan(
        &self,
        pagemap: impl AsFd,
        what: Scan,
        span: Span,
        found: &mut Vec<Region>,
    ) -> Result<(), Errno> {
        for run in self.private_runs() {
            if let ([head, ..], [.., tail]) = (run, run) {
                let (start, end) = (head.start.max(span.start), tail.end.min(span.end));
                if start < end {
                    pagemap::scan(&pagemap, what, start, end, found)?;
                }
            }
        }
        Ok(())
    }

    /// The anonymous pages of the private VMAs that are in memory or swapped out.
    pub fn populated(&self, pagemap: impl AsFd) -> Result<Ranges, Errno> {
        let mut found = Ranges::new();
        for run in self.runs(Vma::is_anonymous) {
            let ([head, ..], [.., tail]) = (run, run) else {
                continue;
            };
            let mut regions = Vec::new();
            let mut scan = |what| pagemap::scan(&pagemap, what, head.start, tail.end, &mut regions);
            if head.is_anonymous() {
                // The holes are few where the pages are many.
                scan(Scan::Holes)?;
                let holes = regions.iter().map(Span::from).collect();
                let all: Ranges = run.iter().map(Span::from).collect();
                all.difference(&holes)
                    .spans()
                    .iter()
                    .for_each(|span| found.push(*span));
            } else {
                scan(Scan::Populated(Backing::File))?;
                regions
                    .iter()
                    .filter(|region| region.categories.is_populated())
                    .for_each(|region| found.push(Span::from(region)));
            }
        }
        Ok(found)
    }
}

/// Whether its pages are kept by the shadow: it is neither shared nor the kernel's own.
fn is_private(vma: &Vma) -> bool {
    !vma.shared && !vma.is_special()
}

/// The part of a VMA in `span`.
fn part(vma: &Vma, span: Span) -> Vma {
    let offset = if vma.is_anonymous() {
        0
    } else {
        vma.offset + (span.start - vma.start)
    };
    Vma {
        start: span.start,
        end: span.end,
        offset,
        ..vma.clone()
    }
}

/// Whether two VMAs that overlap show the same thing at the same addresses.
fn same_backing(one: &Vma, other: &Vma) -> bool {
    one.shared == other.shared
        && (one.device, one.inode) == (other.device, other.inode)
        && one.is_special() == other.is_special()
        && (one.is_anonymous()
            || one.start.wrapping_sub(one.offset) == other.start.wrapping_sub(other.offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vma(start: u64, end: u64, prot: u8, inode: u64) -> Vma {
        Vma {
            start,
            end,
            prot,
            shared: false,
            offset: start * 3,
            device: inode,
            inode,
            name: Box::default(),
        }
    }

    /// One page for each address that `layout` can reach: what is there.
    fn model(layout: &Layout) -> Vec<Option<(u8, u64, u64)>> {
        (0..96)
            .map(|at| {
                let vma = layout.at(at)?;
                let offset = if vma.is_anonymous() {
                    0
                } else {
                    vma.offset + at - vma.start
                };
                Some((vma.prot, vma.inode, offset))
            })
            .collect()
    }

    fn layout() -> impl Strategy<Value = Layout> {
        proptest::collection::vec((0u64..6, 1u64..8, 0u8..3, 0u64..3), 0..8).prop_map(|parts| {
            let mut at = 0;
            let mut vmas = Vec::new();
            for (gap, len, prot, inode) in parts {
                at += gap;
                vmas.push(vma(at, at + len, prot, inode));
                at += len;
            }
            Layout { vmas, window: None }
        })
    }

    proptest! {
        #[test]
        fn the_changes_make_it_as_it_was(was in layout(), is in layout()) {
            let mut pages = model(&is);
            for change in was.changes_from(&is) {
                match change {
                    LayoutChange::Unmap(span) => (span.start..span.end).for_each(|at| pages[at as usize] = None),
                    LayoutChange::Map(vma) => (vma.start..vma.end).for_each(|at| {
                        let offset = if vma.is_anonymous() { 0 } else { vma.offset + at - vma.start };
                        pages[at as usize] = Some((vma.prot, vma.inode, offset));
                    }),
                    LayoutChange::Protect(span, prot) => (span.start..span.end).for_each(|at| {
                        if let Some(page) = &mut pages[at as usize] { page.0 = prot }
                    }),
                }
            }
            prop_assert_eq!(pages, model(&was));
        }

        #[test]
        fn what_is_the_same_needs_nothing(was in layout()) {
            prop_assert_eq!(was.changes_from(&was), vec![]);
        }
    }
}
