//! Samples, their medians and ratios, as a table for people and JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::case::Case;
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
}

impl Sample {
    pub(crate) fn new(
        file_system: &str,
        case: Case,
        who: Contender,
        round: usize,
        figures: Figures,
    ) -> Self {
        let file_system = file_system.to_owned();
        let contender = who.to_string();
        Self { file_system, case: case.name().to_owned(), contender, round, figures, who }
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

impl Report {
    pub(crate) fn new(machine: String, mib: u64, rounds: usize) -> Self {
        Self { machine, mib, rounds, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// A table a case and file system: medians, then our ratios to the limit and to the best qemu-nbd.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{}; {} MiB a round, medians of {} rounds; 1 MiB x 16 x 2 connections, Unix socket\n",
            self.machine, self.mib, self.rounds
        );
        let mut groups: Vec<(&str, &str)> = Vec::new();
        for sample in &self.samples {
            let group = (sample.file_system.as_str(), sample.case.as_str());
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        for (file_system, case) in groups {
            let group: Vec<&Sample> = self
                .samples
                .iter()
                .filter(|s| s.file_system == file_system && s.case == case)
                .collect();
            section(&mut text, &format!("{file_system}, {case}"), &group);
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

fn section(text: &mut String, title: &str, samples: &[&Sample]) {
    let median_of = |who: Contender, figure: fn(&Figures) -> Option<f64>| {
        median(samples.iter().filter(|s| s.who == who).filter_map(|s| figure(&s.figures)).collect())
    };
    let mut rates = BTreeMap::new();
    let _ = writeln!(text, "\n{title}");
    for who in Contender::ALL {
        let Some(rate) = median_of(who, |f| Some(f.bytes_per_sec)) else { continue };
        rates.insert(who.to_string(), rate);
        let _ = write!(text, "  {who:<26} {:>6.2} GiB/s", rate / GIB);
        if let Some(cpu) = median_of(who, |f| f.cpu_secs_per_gib) {
            let _ = write!(text, "  {cpu:>5.2} CPU-s/GiB");
        }
        if let Some(peak) = median_of(who, |f| f.peak_mib) {
            let _ = write!(text, "  {peak:>4.0} MiB resident");
        }
        text.push('\n');
    }
    let rate = |who: Contender| rates.get(&who.to_string()).copied();
    let limit = [Contender::Wire, Contender::HostFile].into_iter().filter_map(rate);
    let limit = limit.reduce(f64::min);
    let best = Contender::QEMU.into_iter().filter_map(rate).reduce(f64::max);
    if let (Some(ours), Some(limit), Some(best)) = (rate(Contender::Ours), limit, best) {
        let _ = writeln!(
            text,
            "  ours: {:.2} of the limit, {:.2} x best qemu-nbd",
            ours / limit,
            ours / best
        );
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
