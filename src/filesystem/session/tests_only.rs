//! What tests ask of the files of a tree.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use super::early::Prepared;
use super::{Files, Mounts, Plans, complete, plan, recognize, seen, watched};
use crate::filesystem::Result;
use crate::filesystem::area::Found;
use crate::filesystem::image::Image;
use crate::filesystem::plan::Op;
use crate::filesystem::plan::Plan;
use crate::filesystem::tree::NodeId;
use crate::filesystem::tree::{Node, Tree};
use crate::filesystem::walk::At;

/// The plan of the only area by all of both trees, to be called after [`Files::plan`]; and what that planned.
pub(crate) fn full_plan(
    files: &mut Files,
    mounts: &Mounts,
    image: &Image,
    plans: &Plans,
) -> Result<[BTreeSet<String>; 2]> {
    let (area, mounted, cut) = (&image.areas[0], &mounts.0[0], &plans.0[0]);
    let index = files.index(&area.area);
    let live = &files.known[index];
    let known = &live.inodes;
    let seen = seen(&mut files.journal);
    let watched = match (&mut files.touched, live.device) {
        (Some(touched), Some(device)) => super::told(touched, device),
        _ => watched(&mut files.journal, &seen),
    };
    let mut recognize = |at: At<'_>, node: &mut Node| recognize(mounted, known, at, node);
    let mut live = crate::filesystem::walk::walk(mounted, known, watched, &mut recognize)?;
    let mut wanted = area.tree.clone();
    complete(mounted, &mut wanted, &mut live)?;
    let full = plan(&wanted, &live);
    Ok([told(&wanted, &full), told(&cut.wanted, &cut.plan)])
}

/// What a plan does, without the numbers of nodes. Names are changed in an order, which is told; inodes in any.
fn told(wanted: &Tree, plan: &Plan) -> BTreeSet<String> {
    let of = |node: &NodeId| wanted.nodes[*node].meta.stat.identity();
    let ops = plan.ops.iter().enumerate().map(|(number, op)| match op {
        Op::Stash(path, node) => format!("{number} stash {path:?} {:?}", of(node)),
        Op::Make(path, node) => format!("{number} make {path:?} {:?}", of(node)),
        Op::Unstash(node, path) => format!("{number} unstash {path:?} {:?}", of(node)),
        Op::Rewrite(path, node) => format!("rewrite {path:?} {:?}", of(node)),
        Op::Rights(path, node) => format!("rights {path:?} {:?}", of(node)),
        Op::Times(path, node) => format!("times {path:?} {:?}", of(node)),
        other => format!("{number} {other:?}"),
    });
    let after = plan.after.iter();
    let after = after.map(|(node, path)| format!("after {path:?} {:?}", of(node)));
    let made = plan.made.iter().map(|node| format!("made {:?}", of(node)));
    let touched = plan.touched.values();
    let touched = touched.map(|path| format!("touched {path:?}"));
    ops.chain(after).chain(made).chain(touched).collect()
}

/// Prepares areas that were not discovered.
pub(crate) fn files_of(
    files: &mut Files,
    root: Pid,
    found: Found,
    others: &[&Image],
) -> Result<Prepared> {
    let prepared = Files::open_found(root, found)?;
    files.begin(prepared, others.iter().copied())
}

/// Does as on a kernel that has no journal of inodes.
pub(crate) fn without_journal(files: &mut Files) {
    files.tried = true;
}
