//! Exports whose images are waited for: what there is of them, and when it is time to open one. Opening and serving it is
//! the catalogue's.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::images::Opening;
use super::numbered;
use super::options::ExportSpec;
use super::wanted::Wanted;

/// The time from one look to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// The most looks after which what could not be opened is tried again, though it is as it was.
const MAX_LOOKS: u32 = 64;

/// A file as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stamp {
    File { id: (u64, u64, u64), len: u64, modified: (i64, i64), changed: (i64, i64) },
    Error(io::ErrorKind),
}

/// What there is of an image: its files.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen(Vec<Stamp>);

impl Seen {
    /// Looks for the image of an export; `None` where it is missing or empty. Blocks.
    fn of(spec: &ExportSpec) -> Option<Self> {
        let (mut stamps, mut is_empty) = (Vec::new(), true);
        for (_, looked) in numbered::looked_at(spec) {
            let stamp = match looked {
                Ok(metadata) => {
                    is_empty &= metadata.is_file() && metadata.len() == 0;
                    Stamp::File {
                        id: (metadata.dev(), metadata.ino(), metadata.rdev()),
                        len: metadata.len(),
                        modified: (metadata.mtime(), metadata.mtime_nsec()),
                        changed: (metadata.ctime(), metadata.ctime_nsec()),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => {
                    is_empty = false;
                    Stamp::Error(error.kind())
                }
            };
            stamps.push(stamp);
        }
        (!is_empty).then_some(Self(stamps))
    }
}

/// An export that is to be served once there is its image.
#[derive(Debug)]
pub(super) struct Absent {
    wanted: Wanted,
    /// At the last look.
    seen: Option<Seen>,
    failure: Option<Failure>,
    /// Whether it is time to open it.
    is_ready: bool,
}

/// What kept an image from being served.
#[derive(Debug)]
struct Failure {
    seen: Option<Seen>,
    text: String,
    /// After how many looks it is tried again, and how many of them are left.
    looks: u32,
    left: u32,
}

impl Absent {
    /// An export with what there is of its image.
    pub(super) async fn look(wanted: &Wanted) -> Self {
        let spec = wanted.spec.clone();
        let seen = tokio::task::spawn_blocking(move || Seen::of(&spec)).await;
        let (wanted, seen) = (wanted.clone(), seen.unwrap_or_default());
        Self { wanted, seen, failure: None, is_ready: false }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.seen.is_none()
    }

    /// Whether it is time to open it: it is as it was at the look before, and another than what failed; or else that is
    /// some looks ago, because what is in the way need not be the file.
    ///
    /// What is `urgent` is opened as it is.
    fn see(&mut self, seen: Option<Seen>, urgent: bool) {
        let settled = seen.is_some() && (urgent || seen == self.seen);
        self.seen = seen;
        if self.seen.is_none() {
            // Whatever comes next is news.
            self.failure = None;
        }
        self.is_ready = settled
            && match &mut self.failure {
                Some(failure) if failure.seen == self.seen && !urgent => {
                    failure.left = failure.left.saturating_sub(1);
                    failure.left == 0
                }
                _ => true,
            };
    }

    /// Keeps why it could not be served; whether that is news.
    pub(super) fn fail(&mut self, text: String) -> bool {
        let known = self.failure.take().filter(|known| known.seen == self.seen);
        let looks = known.as_ref().map_or(2, |known| (known.looks * 2).min(MAX_LOOKS));
        let is_news = known.is_none_or(|known| known.text != text);
        if is_news {
            let name = &self.wanted.spec.name;
            tracing::error!("{text}; the export {name:?} waits until that changes");
        }
        self.failure = Some(Failure { seen: self.seen.clone(), text, looks, left: looks });
        is_news
    }
}

/// What a look found.
#[derive(Debug, Default)]
struct Looked {
    images: Vec<(ExportSpec, Option<Seen>)>,
    urgent: bool,
}

/// What is looked for, by names of exports.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    absent: BTreeMap<String, Absent>,
    /// How their images are opened.
    how: Opening,
    next: Option<Instant>,
    /// Whether what the next look finds is urgent.
    urgent: bool,
    looking: Option<JoinHandle<Looked>>,
}

impl Awaited {
    pub(super) fn knows(&self, name: &str) -> bool {
        self.absent.contains_key(name)
    }

    pub(super) fn how(&self) -> &Opening {
        &self.how
    }

    /// From now on these are waited for, and no others. What is known of them stays.
    pub(super) fn become_these(&mut self, absent: Vec<Absent>, how: Opening) {
        let mut before = std::mem::take(&mut self.absent);
        for one in absent {
            let Wanted { spec, .. } = &one.wanted;
            let name = spec.name.clone();
            let one = match before.remove(&name) {
                Some(known) if known.wanted.spec == *spec => Absent { wanted: one.wanted, ..known },
                _ => {
                    let image = spec.path.display();
                    tracing::info!(export = name, %image, "waiting for the image of an export");
                    one
                }
            };
            self.absent.insert(name, one);
        }
        self.how = how;
    }

    /// Waits until it is time to open one. Waits for ever where none is waited for. Nothing is lost where the future is
    /// dropped.
    pub(super) async fn appeared(&mut self) {
        if self.absent.is_empty() {
            return std::future::pending().await;
        }
        while !self.absent.values().any(|one| one.is_ready) {
            if self.looking.is_none() {
                sleep_until(self.next.unwrap_or_else(Instant::now)).await;
            }
            let (absent, urgent) = (&self.absent, &mut self.urgent);
            let looking = self.looking.get_or_insert_with(|| {
                let specs: Vec<_> = absent.values().map(|one| one.wanted.spec.clone()).collect();
                let urgent = std::mem::take(urgent);
                tokio::task::spawn_blocking(move || {
                    let look = |spec: ExportSpec| (spec.clone(), Seen::of(&spec));
                    Looked { images: specs.into_iter().map(look).collect(), urgent }
                })
            });
            let looked = looking.await.unwrap_or_default();
            self.looking = None;
            self.next = (!self.urgent).then(|| Instant::now() + PAUSE);
            for (spec, seen) in looked.images {
                let known = self.absent.get_mut(&spec.name);
                // A reload may have come between.
                if let Some(one) = known.filter(|known| known.wanted.spec == spec) {
                    one.see(seen, looked.urgent);
                }
            }
        }
    }

    /// Looks at once, and takes what is there as it is, because somebody knows that it is whole.
    pub(super) fn hurry(&mut self) {
        (self.urgent, self.next) = (true, None);
    }

    /// Those that are to be opened now. They are waited for until they are told to be served.
    pub(super) fn take_ready(&mut self) -> Vec<Wanted> {
        let ready =
            |one: &mut Absent| std::mem::take(&mut one.is_ready).then(|| one.wanted.clone());
        self.absent.values_mut().filter_map(ready).collect()
    }

    /// What is served is not waited for any more.
    pub(super) fn served(&mut self, spec: &ExportSpec) {
        self.absent.remove(&spec.name);
        let image = spec.path.display();
        tracing::info!(export = spec.name, %image, "its image is there: the export is served");
    }

    /// One could not be served, and is waited for.
    pub(super) fn failed(&mut self, name: &str, text: String) {
        if let Some(one) = self.absent.get_mut(name) {
            one.fail(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn absent(path: &std::path::Path) -> Absent {
        let spec = ExportSpec { path: path.to_owned(), ..ExportSpec::default() };
        Absent { wanted: Wanted { spec, place: None }, seen: None, failure: None, is_ready: false }
    }

    fn seen(len: u64) -> Option<Seen> {
        let (modified, changed) = ((1, 0), (1, 0));
        Some(Seen(vec![Stamp::File { id: (1, 2, 0), len, modified, changed }]))
    }

    #[test]
    fn what_grows_is_not_ready_until_it_stays_as_it_is() {
        let mut one = absent("x".as_ref());
        let ready = [None, seen(5), seen(7), seen(7), None, seen(7), seen(7)].map(|seen| {
            one.see(seen, false);
            one.is_ready
        });
        assert_eq!(ready, [false, false, false, true, false, false, true]);
    }

    #[test]
    fn what_fails_is_told_once_for_each_change_and_tried_ever_more_seldom() {
        let mut one = absent("x".as_ref());
        let mut told = Vec::new();
        let mut tries = |one: &mut Absent, looks: u32, len: u64| {
            (0..looks)
                .filter(|_| {
                    one.see(seen(len), false);
                    let tried = one.is_ready;
                    if tried {
                        told.push(one.fail("broken".to_owned()));
                    }
                    tried
                })
                .count()
        };
        assert_eq!(tries(&mut one, 2 + 2 + 4 + 8 + 16, 5), 5);
        assert_eq!(tries(&mut one, 2, 6), 1, "it is another one");
        assert_eq!(told, [true, false, false, false, false, true]);
        one.see(seen(6), true);
        assert!(one.is_ready, "what is urgent is tried at once");
        assert!(one.fail("otherwise".to_owned()) && !one.fail("otherwise".to_owned()));
    }

    #[test]
    fn a_file_is_there_once_it_holds_something() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let spec = |joins| ExportSpec { path: path("disk"), joins, ..ExportSpec::default() };
        assert_eq!([false, true].map(|joins| Seen::of(&spec(joins))), [None, None]);
        std::fs::write(path("disk"), "").unwrap();
        std::fs::write(path("disk.0"), "").unwrap();
        assert_eq!([false, true].map(|joins| Seen::of(&spec(joins))), [None, None]);
        std::fs::write(path("disk.1"), "a").unwrap();
        assert_eq!(Seen::of(&spec(false)), None);
        let one = Seen::of(&spec(true)).unwrap();
        assert_eq!(one.0.len(), 2);
        std::fs::write(path("disk.2"), "b").unwrap();
        assert_ne!(Seen::of(&spec(true)), Some(one), "another part is a change");
        let within = ExportSpec { path: path("disk.2/x"), ..ExportSpec::default() };
        assert_eq!(Seen::of(&within), Some(Seen(vec![Stamp::Error(io::ErrorKind::NotADirectory)])));
    }
}
