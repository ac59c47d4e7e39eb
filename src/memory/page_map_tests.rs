use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn address(page: u64) -> u64 {
    // Scattered over nodes of all levels.
    (page % 40) * PAGE + (page / 40) * (3 << 30)
}

#[derive(Debug, Clone)]
enum Act {
    Set(usize, u64),
    Clear(usize, u64, u64),
    Copy(usize, usize),
    Drop(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let map = 0usize..4;
    prop_oneof![
        6 => (map.clone(), 0u64..120).prop_map(|(map, page)| Act::Set(map, page)),
        1 => (map.clone(), 0u64..120, 1u64..60).prop_map(|(map, page, len)| Act::Clear(map, page, len)),
        2 => (map.clone(), map.clone()).prop_map(|(from, to)| Act::Copy(from, to)),
        1 => map.prop_map(Act::Drop),
    ]
}

proptest! {
    #[test]
    fn maps_that_share_are_as_maps_that_do_not(acts in proptest::collection::vec(act(), 0..80)) {
        let store = PageStore::default();
        let mut maps = vec![PageMap::new(store.clone()); 4];
        let mut model = vec![BTreeMap::<u64, u32>::new(); 4];
        for act in acts {
            match act {
                Act::Set(map, page) => {
                    let slot = store.take(1).unwrap()[0].0;
                    maps[map].set(address(page), slot);
                    model[map].insert(address(page), slot);
                }
                Act::Clear(map, page, len) => {
                    let span = Span { start: address(page), end: address(page) + len * PAGE };
                    maps[map].clear(&Ranges::from_iter([span]));
                    model[map].retain(|page, _| *page < span.start || *page >= span.end);
                }
                Act::Copy(from, to) => {
                    maps[to] = maps[from].clone();
                    model[to] = model[from].clone();
                }
                Act::Drop(map) => {
                    maps[map] = PageMap::new(store.clone());
                    model[map].clear();
                }
            }
            for (map, model) in maps.iter().zip(&model) {
                let mut found = BTreeMap::new();
                map.each_in(Span::ALL, |page, slot| { found.insert(page, slot); });
                prop_assert_eq!(&found, model);
                prop_assert_eq!(map.len(), model.len() as u64);
                prop_assert_eq!(map.pages().pages(), model.len() as u64);
                prop_assert!(model.iter().all(|(page, slot)| map.get(*page) == Some(*slot)));
            }
            let mut had: Vec<u32> = model.iter().flat_map(|map| map.values().copied()).collect();
            had.sort_unstable();
            had.dedup();
            prop_assert_eq!(store.bytes(), had.len() as u64 * PAGE);
            for (one, other) in [(0, 1), (1, 2), (2, 3), (3, 0)] {
                let differ = maps[one].differences(&maps[other]);
                let pages = model[one].keys().chain(model[other].keys());
                let expected = pages.filter(|page| model[one].get(page) != model[other].get(page));
                let expected: std::collections::BTreeSet<u64> = expected.copied().collect();
                let found: std::collections::BTreeSet<u64> = differ.pieces(PAGE).map(|span| span.start).collect();
                prop_assert_eq!(found, expected);
            }
        }
        drop(maps);
        prop_assert_eq!(store.bytes(), 0);
    }
}

/// An index costs a few per cent of what it points to, however far apart the pages are.
#[test]
fn a_map_that_differs_little_costs_little() {
    let store = PageStore::default();
    let mut map = PageMap::new(store.clone());
    for page in 0..10_000 {
        map.set(page * PAGE, store.take(1).unwrap()[0].0);
    }
    let child = map.clone();
    // A leaf and its path are copied for each, but no more.
    let per_leaf = size_of::<Leaf>() + 2 * size_of::<usize>();
    assert!(per_leaf * 20 < PAGE as usize, "{per_leaf}");
    let before = store.bytes();
    map.set(5 * PAGE, store.take(1).unwrap()[0].0);
    assert_eq!(store.bytes(), before + PAGE);
    assert_eq!(map.differences(&child).pages(), 1);
}

#[test]
fn what_is_forgotten_is_like_nothing_else() {
    let store = PageStore::default();
    let mut parent = PageMap::new(store.clone());
    for page in 0..100 {
        parent.set(page * PAGE, store.take(1).unwrap()[0].0);
    }
    let mut now = parent.clone();
    for page in 50..60 {
        now.set(page * PAGE, store.take(1).unwrap()[0].0);
    }
    let node = now.clone();
    now.forget();
    assert!(now.unknown().is_empty(), "the node has all of it");
    drop(node);
    now.forget();
    assert_eq!(now.unknown().pages(), 10);
    assert_eq!(store.bytes(), 100 * PAGE);
    assert_eq!(now.differences(&parent).pages(), 10);
    assert_eq!(now.differences(&now.clone()).pages(), 0, "the same tree");
    let mut next = now.clone();
    next.set(55 * PAGE, store.take(1).unwrap()[0].0);
    assert!(
        next.differences(&now).pages() >= 10,
        "the others may differ"
    );
}
