//! Whatever pages there are, what is written is read, zeroes are not written, and identical pages once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::layout::Encoding;
use super::pages::Store;
use super::persist::Progress;
use super::reading::StoredPages;
use super::write::{Content, Writer};
use crate::memory::{PAGE, Ranges, Span};
use crate::record::{Context, Frames, ImageHeader, Kind, ObjectId};

const LEN: usize = PAGE as usize;

/// Pages by their number; each is made of a seed, 0 is a page of zeroes.
type Model = BTreeMap<u64, u8>;

struct Modelled<'m> {
    id: ObjectId,
    pages: &'m Model,
    is_stable: bool,
}

fn page(seed: u8) -> [u8; LEN] {
    let mut page = [0; LEN];
    if seed != 0 {
        page[usize::from(seed)] = seed;
        page[LEN - 1] = seed / 2;
    }
    page
}

impl Content for Modelled<'_> {
    fn id(&self) -> ObjectId {
        self.id
    }

    fn name(&self) -> String {
        "a model".into()
    }

    fn is_stable(&self) -> bool {
        self.is_stable
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        let numbers = spans
            .iter()
            .flat_map(|span| span.start / PAGE..span.end / PAGE);
        for (number, bytes) in numbers.zip(buffer.chunks_exact_mut(LEN)) {
            let seed = self.pages.get(&number).ok_or(io::ErrorKind::NotFound)?;
            bytes.copy_from_slice(&page(*seed));
        }
        Ok(())
    }
}

fn span(number: u64) -> Span {
    Span {
        start: number * PAGE,
        end: (number + 1) * PAGE,
    }
}

/// Runs of neighbours with gaps between them, of few different pages.
fn model() -> impl Strategy<Value = Model> {
    let run = (0u64..40, proptest::collection::vec(0u8..12, 1..120));
    proptest::collection::vec(run, 0..5).prop_map(|runs| {
        let (mut model, mut at) = (Model::new(), 3);
        for (gap, seeds) in runs {
            at += gap;
            for seed in seeds {
                model.insert(at, seed);
                at += 1;
            }
        }
        model
    })
}

/// Writes models as objects from 2 on; the file that comes of it.
fn write(models: &[Model], encoding: Encoding, is_stable: bool) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    let sink = Box::new(file.try_clone().unwrap());
    let mut context = Context::streaming_beside(sink, ImageHeader::here()).unwrap();
    let ids = (2..).map(|number| ObjectId::from_raw(number).unwrap());
    let contents: Vec<Box<dyn Content + '_>> = models
        .iter()
        .zip(ids)
        .map(|(pages, id)| -> Box<dyn Content + '_> {
            Box::new(Modelled {
                id,
                pages,
                is_stable,
            })
        })
        .collect();
    let progress = Progress::default();
    let path = Path::new("model");
    let mut writer = Writer::new(&mut context, path, encoding, &progress, &contents);
    for (number, model) in models.iter().enumerate() {
        let ranges: Ranges = model.keys().map(|number| span(*number)).collect();
        writer.write(number, &ranges).unwrap();
    }
    let records = writer.records();
    context.finish().unwrap();
    assert_eq!(
        context
            .stats()
            .by_kind
            .get(&Kind::Pages)
            .map_or(0, |it| it.records),
        records
    );
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        models in proptest::collection::vec(model(), 1..4),
        zstd in any::<bool>(),
        is_stable in any::<bool>(),
        spans in proptest::collection::vec((0u64..400, 1u64..150), 1..6),
    ) {
        let encoding = if zstd { Encoding::Zstd } else { Encoding::Plain };
        let file = write(&models, encoding, is_stable);
        let store = Store::new(Frames::open(file).unwrap(), "model".into()).unwrap();
        prop_assert_eq!(store.problems().count(), 0);
        let store = Arc::new(store);
        for (model, number) in models.iter().zip(2..) {
            let id = ObjectId::from_raw(number).unwrap();
            let pages = StoredPages::new(store.clone(), id);
            let spans: Vec<Span> = spans
                .iter()
                .map(|(start, count)| Span { start: start * PAGE, end: (start + count) * PAGE })
                .collect();
            let len: u64 = spans.iter().map(Span::len).sum();
            let mut buffer = vec![0xee; len as usize];
            pages.read(&spans, &mut buffer).unwrap();
            let numbers = spans.iter().flat_map(|span| span.start / PAGE..span.end / PAGE);
            for (number, bytes) in numbers.zip(buffer.chunks_exact(LEN)) {
                let seed = model.get(&number).copied().unwrap_or(0);
                prop_assert!(bytes == page(seed), "page {} of {}", number, id);
            }
            let runs = store.index(id).unwrap();
            let covered: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
            prop_assert_eq!(covered, model.values().filter(|seed| **seed != 0).count() as u64);
        }
        let frames = store.frames().frames().iter();
        let lens = frames.filter(|frame| frame.kind() == Kind::Pages).map(|frame| frame.payload_len() - 8);
        let different: BTreeSet<u8> = models.iter().flat_map(Model::values).copied().collect();
        let different = different.into_iter().filter(|seed| *seed != 0).count() as u64;
        let bytes: u64 = lens.sum();
        if is_stable && encoding == Encoding::Plain {
            prop_assert_eq!(bytes, different * PAGE);
        }
    }
}

#[test]
fn several_threads_read_at_the_same_time() {
    let models: Vec<Model> = vec![
        (0..2000)
            .map(|number| (number, (number % 251) as u8))
            .collect(),
    ];
    let file = write(&models, Encoding::Zstd, false);
    let store = Store::new(Frames::open(file).unwrap(), "model".into()).unwrap();
    let pages = StoredPages::new(Arc::new(store), ObjectId::from_raw(2).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let pages = pages.clone();
            scope.spawn(move || {
                let mut bytes = [0; LEN];
                for step in 0..2000 {
                    let number = (step * 7 + thread * 501) % 2000;
                    pages.read(&[span(number)], &mut bytes).unwrap();
                    assert!(bytes == page((number % 251) as u8));
                }
            });
        }
    });
}
