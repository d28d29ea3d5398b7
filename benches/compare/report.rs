//! Samples, their medians and ratios, as a table for people and JSON for programs. How they are drawn is told in
//! `picture`, and what ratios were accepted before in `accepted`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::accepted::{Accepted, Ratios};
use crate::case::{Case, Pattern};
use crate::peer::{Contender, Figures};

const GIB: f64 = (1u64 << 30) as f64;

/// One measurement of one contender.
#[derive(Serialize)]
pub(crate) struct Sample {
    file_system: String,
    case: String,
    contender: String,
    round: usize,
    #[serde(flatten)]
    figures: Figures,
    #[serde(skip)]
    who: Contender,
    #[serde(skip)]
    what: Case,
}

impl Sample {
    pub(crate) fn new(
        file_system: &str,
        what: Case,
        who: Contender,
        round: usize,
        figures: Figures,
    ) -> Self {
        let (file_system, case) = (file_system.to_owned(), what.name.to_owned());
        Self { file_system, case, contender: who.to_string(), round, figures, who, what }
    }
}

/// All samples of a run.
#[derive(Serialize)]
pub(crate) struct Report {
    machine: String,
    mib: u64,
    rounds: usize,
    samples: Vec<Sample>,
}

/// The medians of one contender.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Median {
    pub(crate) who: Contender,
    pub(crate) bytes_per_sec: f64,
    cpu_secs_per_gib: Option<f64>,
    peak_mib: Option<f64>,
    ready_secs: Option<f64>,
}

/// A case on a file system.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    pub(crate) file_system: String,
    pub(crate) case: Case,
    pub(crate) medians: Vec<Median>,
}

impl Report {
    pub(crate) fn new(machine: String, mib: u64, rounds: usize) -> Self {
        Self { machine, mib, rounds, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// What was measured, by whom and on what, in a line.
    pub(crate) fn title(&self) -> String {
        format!(
            "{}; disks of {} MiB, medians of {} rounds; 2 connections, each with 16 requests of 1 MiB or 32 of 4 KiB",
            self.machine, self.mib, self.rounds
        )
    }

    /// The cases on their file systems, in the order in which they were measured.
    pub(crate) fn sections(&self) -> Vec<Section> {
        let mut sections: Vec<Section> = Vec::new();
        for sample in &self.samples {
            let is_here = |section: &Section| {
                section.file_system == sample.file_system && section.case == sample.what
            };
            if !sections.iter().any(is_here) {
                sections.push(self.section(&sample.file_system, sample.what));
            }
        }
        sections
    }

    fn section(&self, file_system: &str, case: Case) -> Section {
        let is_here = |s: &&Sample| s.file_system == file_system && s.what == case;
        let samples: Vec<&Sample> = self.samples.iter().filter(is_here).collect();
        let median_of = |who: Contender, figure: fn(&Figures) -> Option<f64>| {
            let of = samples.iter().filter(|s| s.who == who);
            median(of.filter_map(|s| figure(&s.figures)).collect())
        };
        let medians = Contender::ALL.into_iter().filter_map(|who| {
            Some(Median {
                who,
                bytes_per_sec: median_of(who, |f| Some(f.bytes_per_sec))?,
                cpu_secs_per_gib: median_of(who, |f| f.cpu_secs_per_gib),
                peak_mib: median_of(who, |f| f.peak_mib),
                ready_secs: median_of(who, |f| f.ready_secs),
            })
        });
        Section { file_system: file_system.to_owned(), case, medians: medians.collect() }
    }

    /// A table a case and file system: medians, then our ratios beside those that were accepted.
    pub(crate) fn table(&self, accepted: &Accepted) -> String {
        let mut text = self.title() + "\n";
        for section in self.sections() {
            section.write(&mut text, accepted);
        }
        text
    }

    pub(crate) fn write_json(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, serde_json::to_vec_pretty(self)?)?;
        eprintln!("samples in {}", path.display());
        Ok(())
    }
}

impl Section {
    /// The name under which its ratios are accepted.
    pub(crate) fn name(&self) -> String {
        format!("{}, {}", self.file_system, self.case.name)
    }

    fn rate(&self, who: Contender) -> Option<f64> {
        self.medians.iter().find(|one| one.who == who).map(|one| one.bytes_per_sec)
    }

    /// The lower of what the wire and the host file give, in bytes per second.
    pub(crate) fn limit(&self) -> Option<f64> {
        let limits = [Contender::Wire, Contender::HostFile].into_iter();
        limits.filter_map(|who| self.rate(who)).reduce(f64::min)
    }

    /// What our server makes of the limits, and beside others.
    pub(crate) fn ratios(&self) -> Option<Ratios> {
        let ours = self.rate(Contender::Ours)?;
        let best = Contender::QEMU.into_iter().filter_map(|who| self.rate(who)).reduce(f64::max)?;
        Some(Ratios {
            limit: ours / self.limit()?,
            qemu: ours / best,
            flat: self.rate(Contender::OursFlat).map(|flat| ours / flat),
        })
    }

    fn write(&self, text: &mut String, accepted: &Accepted) {
        let _ = writeln!(text, "\n{}", self.name());
        for one in &self.medians {
            let _ = write!(text, "  {:<26} ", one.who);
            let _ = match self.case.pattern {
                Pattern::Sequential => write!(text, "{:>6.2} GiB/s", one.bytes_per_sec / GIB),
                Pattern::Random => write!(text, "{:>6.1} k/s  ", one.bytes_per_sec / 4096.0 / 1e3),
            };
            if let Some(cpu) = one.cpu_secs_per_gib {
                let _ = write!(text, "  {cpu:>5.2} CPU-s/GiB");
            }
            if let Some(peak) = one.peak_mib {
                let _ = write!(text, "  {peak:>4.0} MiB resident");
            }
            if let Some(ready) = one.ready_secs {
                let _ = write!(text, "  ready after {:>4.0} ms", ready * 1e3);
            }
            text.push('\n');
        }
        if let Some(ratios) = self.ratios() {
            let _ = writeln!(text, "  ours: {}", accepted.beside(&self.name(), &ratios));
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::CASES;

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn ratios_are_those_to_the_lower_limit_and_to_the_best_of_the_others() {
        let mut report = Report::new("here".into(), 8, 1);
        for (who, rate) in [
            (Contender::Wire, 8.0),
            (Contender::HostFile, 4.0),
            (Contender::Ours, 3.0),
            (Contender::QemuDefault, 1.0),
            (Contender::QemuUring, 2.0),
        ] {
            let figures = Figures { bytes_per_sec: rate, ..Figures::default() };
            report.add(Sample::new("ext4", CASES[0], who, 1, figures));
        }
        let sections = report.sections();
        let [section] = &sections[..] else { panic!("{sections:?}") };
        assert_eq!(section.ratios(), Some(Ratios { limit: 0.75, qemu: 1.5, flat: None }));
    }
}
