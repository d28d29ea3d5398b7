//! Flushing and closing: writes what the core's flush plan says, in its order, with a sync between its stages. What
//! has to be written, and why in that order, is decided in the core.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{ByteRange, ErrorKind, Hold, HostError, HostOp, try_join_all};
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

use crate::core::Core;
use crate::error::Error;
use crate::flush::{Captured, FlushPlan, Reached};
use crate::header::DIRTY;
use crate::image::{Inner, Live};
use crate::refcount::MetaWrite;
use crate::units::Run;

/// The unit in which hosts allocate, in bytes.
const HOST_BLOCK_BYTES: u64 = 4096;
/// How often closing flushes at most: each round frees what the one before made free.
const CLOSE_ROUNDS: usize = 8;

/// What every host operation of a flush holds. The last one to let go gives back to the core what was taken out of it
/// and not confirmed, and only then lets the next flush begin.
struct Pass {
    core: Arc<Mutex<Core>>,
    stage: Mutex<Stage>,
    _gate: OwnedMutexGuard<()>,
}

/// How far a flush has come.
enum Stage {
    /// Some of it may be on disk, up to this stage of the plan.
    Writing(Captured, Reached),
    /// All of it is. Of `gone` one reference each has to be dropped; `unused` are free, but not to be taken yet.
    Freeing {
        gone: Vec<Run>,
        unused: Vec<Run>,
    },
    Done,
}

impl Drop for Pass {
    fn drop(&mut self) {
        match std::mem::replace(self.stage.get_mut(), Stage::Done) {
            Stage::Writing(captured, reached) => self.core.lock().revert(captured, reached),
            Stage::Freeing { gone, unused } => {
                let mut core = self.core.lock();
                core.give_back(&gone);
                core.release(&unused);
            }
            Stage::Done => {}
        }
    }
}

impl Inner {
    /// Makes durable everything that had returned before this call, with the metadata that finds it.
    ///
    /// One at a time. Who comes while one runs waits for the next and shares it with all others who do.
    pub(crate) async fn flush(&self, live: &Live) -> Result<(), Error> {
        let arrived = self.flushes_begun.load(Ordering::SeqCst);
        let gate = Arc::clone(&self.flush_gate).lock_owned().await;
        if self.flushes_done.load(Ordering::SeqCst) > arrived {
            return Ok(());
        }
        // Poisoned meanwhile?
        self.live_while_closing()?;
        let number = self.flushes_begun.fetch_add(1, Ordering::SeqCst) + 1;
        let (plan, captured) = self.core.lock().capture();
        let pass = Arc::new(Pass {
            core: Arc::clone(&self.core),
            stage: Mutex::new(Stage::Writing(captured, Reached::default())),
            _gate: gate,
        });
        let hold: Hold = Some(Arc::clone(&pass) as _);
        let checked = self.core.lock().check_plan(&plan);
        if let Err(fault) = checked {
            let error = self.fault(fault);
            self.give_up_changing(live, &error, &hold).await;
            return Err(error);
        }
        if let Err(error) = write_plan(live, plan, &pass, &hold).await {
            // No room for a write: what it was to change is in memory still, and nothing points at it yet.
            let undone = error.kind() == ErrorKind::NoSpace && error.op != HostOp::Sync;
            let error = Error::Host(error);
            return Err(if undone { error } else { self.poison(error) });
        }
        pass.landed();
        self.free_dropped(live, &pass, &hold).await;
        self.flushes_done.fetch_max(number, Ordering::SeqCst);
        Ok(())
    }

    /// Drops the references that are gone on disk now, and gives the host back what nobody uses any more. Failing here
    /// loses space until the next try, nothing else.
    async fn free_dropped(&self, live: &Live, pass: &Arc<Pass>, hold: &Hold) {
        let per_block = self.core.lock().refs.per_block();
        while let Some(run) = pass.next_gone(per_block) {
            let dropped = self.step_in_flush(live, |core| core.drop_run(run)).await;
            match dropped {
                Ok(unused) => pass.set_unused(unused),
                Err(error) => {
                    tracing::warn!(image = %self.path.display(), %error, "space stays in use");
                    pass.set_unused(Vec::new());
                    continue;
                }
            }
            for run in pass.unused() {
                let range = whole_blocks(self.core.lock().geometry.host_range(run));
                if live.file.can_punch()
                    && !range.is_empty()
                    && let Err(error) = live.file.punch(range, hold.clone()).await
                {
                    tracing::debug!(image = %self.path.display(), %error, "space was not given back");
                }
            }
            pass.release();
        }
    }

    /// Waits for what is in flight, flushes until nothing is left to free, cuts the file to what is used, and lets go
    /// of it.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        self.start_closing();
        let _guard = self.guests.lock_exclusive(ByteRange::between(0, u64::MAX)).await;
        if self.is_gone() {
            return Ok(());
        }
        let result = match self.has_changed() {
            true => self.finish().await,
            // What should have been the first change may have failed half-way.
            false => self.live_while_closing().map(drop),
        };
        self.let_go();
        result
    }

    async fn finish(&self) -> Result<(), Error> {
        let live = self.live_while_closing()?;
        let saved = self.save_bitmaps(&live).await;
        for _ in 0..CLOSE_ROUNDS {
            self.flush(&live).await?;
            self.step_in_flush(&live, Core::settle).await?;
            if !self.core.lock().is_dirty() {
                break;
            }
        }
        if !live.file.is_fixed_len() {
            let end = self.core.lock().kept_end_bytes();
            live.file.set_len(end).await?;
        }
        live.file.sync().await?;
        self.end_changing(&live).await?;
        saved
    }

    /// Everything is durable: refcounts that may stay behind have not, and the dirty bit goes.
    async fn end_changing(&self, live: &Live) -> Result<(), Error> {
        let sector = {
            let mut core = self.core.lock();
            if !core.header.is_dirty() || core.header.is_corrupt() {
                return Ok(());
            }
            core.header.set_incompatible(DIRTY, false);
            core.header.sector()
        };
        live.file.write(0, sector.into(), None).await?;
        Ok(live.file.sync().await?)
    }
}

impl Pass {
    /// From now on what this stage of the plan writes may be on disk.
    fn reaches(&self, stage: Reached) {
        if let Stage::Writing(_, reached) = &mut *self.stage.lock() {
            *reached = stage;
        }
    }

    /// All that was written is durable.
    fn landed(&self) {
        let mut stage = self.stage.lock();
        if let Stage::Writing(captured, _) = std::mem::replace(&mut *stage, Stage::Done) {
            let gone = self.core.lock().landed(captured);
            *stage = Stage::Freeing { gone, unused: Vec::new() };
        }
    }

    /// The next run to drop, within one refcount block. It stays with the pass until [`Pass::set_unused`].
    fn next_gone(&self, per_block: u64) -> Option<Run> {
        let mut stage = self.stage.lock();
        let Stage::Freeing { gone, .. } = &mut *stage else { return None };
        let run = gone.pop()?;
        let first = per_block - run.start.0 % per_block;
        if run.count > first {
            let rest = Run {
                start: crate::units::HostCluster(run.start.0 + first),
                count: run.count - first,
            };
            gone.push(rest);
        }
        let piece = Run { count: run.count.min(first), ..run };
        gone.push(piece);
        Some(piece)
    }

    /// The run of [`Pass::next_gone`] has been dropped; these of its clusters nobody uses.
    fn set_unused(&self, runs: Vec<Run>) {
        if let Stage::Freeing { gone, unused } = &mut *self.stage.lock() {
            gone.pop();
            *unused = runs;
        }
    }

    fn unused(&self) -> Vec<Run> {
        match &*self.stage.lock() {
            Stage::Freeing { unused, .. } => unused.clone(),
            Stage::Writing(..) | Stage::Done => Vec::new(),
        }
    }

    /// What nobody uses may be taken.
    fn release(&self) {
        if let Stage::Freeing { unused, .. } = &mut *self.stage.lock() {
            let unused = std::mem::take(unused);
            self.core.lock().release(&unused);
        }
    }
}

/// The part of a range that the host can give back: its edges would have to be written.
fn whole_blocks(range: ByteRange) -> ByteRange {
    let start = range.start().next_multiple_of(HOST_BLOCK_BYTES);
    ByteRange::between(start, range.end() - range.end() % HOST_BLOCK_BYTES)
}

async fn write_plan(
    live: &Live,
    plan: FlushPlan,
    pass: &Pass,
    hold: &Hold,
) -> Result<(), HostError> {
    write_all(live, plan.first, hold).await?;
    if !(plan.link.is_empty() && plan.last.is_empty()) {
        live.file.ensure_len(plan.end_bytes).await?;
    }
    // Also what makes data durable: needed even where there is no metadata.
    if let Some(data) = &live.data {
        data.sync().await?;
    }
    live.file.sync().await?;
    for (reached, stage) in [(Reached::Link, plan.link), (Reached::Last, plan.last)] {
        if !stage.is_empty() {
            pass.reaches(reached);
            write_all(live, stage, hold).await?;
            live.file.sync().await?;
        }
    }
    Ok(())
}

async fn write_all(live: &Live, writes: Vec<MetaWrite>, hold: &Hold) -> Result<(), HostError> {
    let all = writes
        .into_iter()
        .map(|write| live.file.write(write.at.0, write.bytes.into(), hold.clone()));
    try_join_all(all).await.map(drop)
}
