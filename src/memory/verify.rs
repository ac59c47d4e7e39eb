//! The oracle: compares a whole address space with its image, by other means than those that put it back.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::freeze::Stopped;
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::{self, Backing, Categories, Region, Scan};
use crate::kernel::procfs;
use crate::outcome::Difference;
use crate::record::Context;

use super::advice;
use super::image::SpaceImage;
use super::layout::Layout;
use super::ranges::{Ranges, Span};
use super::space::{system, window_span};
use super::{Result, USER_END};

/// Most bytes compared at once.
const PIECE: u64 = 1 << 20;

/// Compares the pages of a process with where they came from, as long as nothing of its own runs in it: a shadow that is made
/// of it later has the same faults.
pub fn verify_made(
    stopped: &Stopped,
    image: &SpaceImage,
    context: &Context,
) -> Result<Vec<Difference>> {
    let pid = image.pid;
    let memory = &stopped.member(pid)?.memory;
    let pages = image.populated(context)?.difference(image.guards()?);
    let mut reader = image.source.reader();
    let mut differences = Vec::new();
    let mut live = vec![0; PIECE as usize];
    for span in pages.pieces(PIECE) {
        let compared = reader.look(span, &mut |part, bytes| {
            let live = &mut live[..part.len() as usize];
            memory.read_exact_at(live, part.start)?;
            let is_same = match bytes {
                Some(bytes) => bytes == live,
                None => live.iter().all(|byte| *byte == 0),
            };
            if !is_same {
                differences.push(Difference {
                    what: format!("pid {pid}: pages {:#x} to {:#x}", part.start, part.end),
                    expected: "those of the image".into(),
                    found: "others".into(),
                });
            }
            Ok(())
        });
        compared.map_err(|error| system(pid, "compare its pages", error))?;
    }
    Ok(differences)
}

/// Compares VMA list and every page, byte for byte. `ignored` are bytes that the kernel writes whenever it likes.
pub fn verify(
    stopped: &Stopped,
    image: &SpaceImage,
    context: &Context,
    ignored: &Ranges,
) -> Result<Vec<Difference>> {
    let pid = image.pid;
    let mut differences = Vec::new();
    let read = |of: nix::unistd::Pid, name: &str| {
        std::fs::read(procfs::path(of, name))
            .map_err(|error| system(of, "read its memory map", error))
    };
    let open = |of: nix::unistd::Pid, name: &str| {
        File::open(procfs::path(of, name)).map_err(|error| system(of, "open its memory", error))
    };
    let window = window_span(stopped, pid)?;
    let live = Layout::parse(&read(pid, "maps")?, Some(window)).unwrap_or_default();
    let was = Layout::parse(image.maps_text(context)?, Some(window)).unwrap_or_default();
    let (was, is) = (joined(&was), joined(&live));
    for index in 0..was.len().max(is.len()) {
        let (expected, found) = (was.get(index), is.get(index));
        if expected.map(comparable) != found.map(comparable) {
            differences.push(Difference {
                what: format!("pid {pid}: VMA {index}"),
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
            break;
        }
    }

    let (set, found) = (image.advice(context)?, advice::live(pid, &live)?);
    if !advice::same(set, &found) {
        let list = |list: &[advice::Advised]| {
            let flagged = list.iter().filter(|advised| !advised.flags.is_empty());
            let words = flagged.map(|advised| {
                format!(
                    "{:x}-{:x} {}",
                    advised.span.start,
                    advised.span.end,
                    advised.flags.join(" ")
                )
            });
            words.collect::<Vec<_>>().join(", ")
        };
        differences.push(Difference {
            what: format!("pid {pid}: memory flags"),
            expected: list(set),
            found: list(&found),
        });
    }

    // Where neither has an anonymous page both show zeroes or the same file.
    let scan = |of: nix::unistd::Pid| -> Result<(Ranges, Ranges)> {
        let mut regions = Vec::new();
        pagemap::scan(
            open(of, "pagemap")?,
            Scan::Populated(Backing::File),
            0,
            USER_END,
            &mut regions,
        )
        .map_err(|errno| system(of, "scan its pages", errno))?;
        let is_guard = |region: &&Region| region.categories.has(Categories::GUARD);
        let guards = regions.iter().filter(is_guard).map(Span::from).collect();
        Ok((regions.iter().map(Span::from).collect(), guards))
    };
    let (there, guards) = scan(pid)?;
    let resident = image.source.resident(pid)?;
    let (pages, guards) = match resident.described {
        None => {
            let (expected, of_shadow) = scan(resident.base.shadow.pid)?;
            let copies = resident.pages.pages();
            (there.union(&expected).union(&copies), [guards, of_shadow])
        }
        // The shadow is of another state.
        Some(_) => {
            let expected = image.populated(context)?;
            (there.union(&expected), [guards, image.guards()?.clone()])
        }
    };
    if let [found, expected] = &guards[..]
        && found != expected
    {
        differences.push(Difference {
            what: format!("pid {pid}: guard regions"),
            expected: format!("{:x?}", expected.spans()),
            found: format!("{:x?}", found.spans()),
        });
    }
    let pages = guards
        .iter()
        .fold(pages, |pages, guards| pages.difference(guards));
    let ours: Ranges = live.private().map(Span::from).collect();
    let pages = pages.intersection(&ours);
    let memory = open(pid, "mem")?;
    let (mut found, mut expected) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    for span in pages.pieces(PIECE) {
        let len = span.len() as usize;
        memory
            .read_exact_at(&mut found[..len], span.start)
            .map_err(|error| {
                system(pid, &format!("read its memory at {:#x}", span.start), error)
            })?;
        image
            .source
            .read(&[span], &mut expected[..len])
            .map_err(|error| {
                system(pid, &format!("read its shadow at {:#x}", span.start), error)
            })?;
        let differs = |at: &usize| {
            let address = span.start + *at as u64;
            found[*at] != expected[*at] && !ignored.contains(address)
        };
        if found[..len] != expected[..len]
            && let Some(at) = (0..len).find(differs)
        {
            let address = span.start + at as u64;
            differences.push(Difference {
                what: format!("byte {address:#x} of pid {pid}, in {:?}", live.at(address)),
                expected: format!("{:#04x}", expected[at]),
                found: format!("{:#04x}", found[at]),
            });
            break;
        }
    }
    Ok(differences)
}

/// The VMAs with neighbours joined that differ in nothing that matters.
fn joined(layout: &Layout) -> Vec<Vma> {
    let mut joined: Vec<Vma> = Vec::new();
    for vma in &layout.vmas {
        match joined.last_mut() {
            Some(last)
                if last.continued_by(&Vma {
                    name: last.name.clone(),
                    ..vma.clone()
                }) =>
            {
                last.end = vma.end
            }
            _ => joined.push(vma.clone()),
        }
    }
    joined
}

/// What must be equal of a VMA. The name of anonymous memory only says how it came to be.
fn comparable(vma: &Vma) -> (u64, u64, u8, bool, u64, u64, u64) {
    let offset = if vma.is_anonymous() { 0 } else { vma.offset };
    (
        vma.start, vma.end, vma.prot, vma.shared, offset, vma.device, vma.inode,
    )
}
