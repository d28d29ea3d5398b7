//! The medians as bars, each case against its limit: an SVG, for the README and for whoever compares two runs.

use std::fmt::Write as _;

use crate::peer::Contender;
use crate::report::{Report, Section};

/// Pixels of a bar that reaches the limit.
const LIMIT_WIDTH: f64 = 400.0;
const LABEL_WIDTH: f64 = 210.0;
const ROW: f64 = 18.0;
/// Bars longer than so many limits are cut.
const LONGEST: f64 = 1.4;

/// Draws what our server and the others make of the limit of each case.
pub(crate) fn draw(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 2.0 * ROW;
    for section in report.sections() {
        y = draw_section(&mut body, &section, y);
    }
    let width = LABEL_WIDTH + LIMIT_WIDTH * LONGEST + 120.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"{ROW}\" font-size=\"11\">{}</text>\n{body}</svg>\n",
        escaped(&report.title())
    )
}

/// Draws a case from `y` on; where the next one begins.
fn draw_section(body: &mut String, section: &Section, mut y: f64) -> f64 {
    let Some(limit) = section.limit() else { return y };
    y += ROW;
    let name = escaped(&section.name());
    let _ = writeln!(body, "<text x=\"8\" y=\"{y}\" font-weight=\"bold\">{name}</text>");
    let top = y + ROW / 2.0;
    for one in &section.medians {
        if matches!(one.who, Contender::Wire | Contender::HostFile) {
            continue;
        }
        y += ROW;
        let share = one.bytes_per_sec / limit;
        let width = share.min(LONGEST) * LIMIT_WIDTH;
        let colour = match one.who {
            Contender::Ours | Contender::OursFlat => "#1f6f5c",
            _ => "#b0b7bf",
        };
        let (bar, text, end) = (y - ROW * 0.7, y, LABEL_WIDTH + width + 6.0);
        let _ = writeln!(
            body,
            "<text x=\"16\" y=\"{text}\">{}</text>\
             <rect x=\"{LABEL_WIDTH}\" y=\"{bar}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
             <text x=\"{end:.1}\" y=\"{text}\">{share:.2}</text>",
            escaped(&one.who.to_string()),
            ROW * 0.8,
        );
    }
    let (x, bottom) = (LABEL_WIDTH + LIMIT_WIDTH, y + ROW / 4.0);
    let _ = writeln!(
        body,
        "<line x1=\"{x}\" x2=\"{x}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#c0392b\" stroke-dasharray=\"4 3\"/>"
    );
    y + ROW / 2.0
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::CASES;
    use crate::peer::Figures;
    use crate::report::Sample;

    #[test]
    fn a_bar_is_as_long_as_its_share_of_the_limit() {
        let mut report = Report::new("a <machine>".into(), 8, 1);
        for (who, rate) in
            [(Contender::HostFile, 4.0), (Contender::Ours, 3.0), (Contender::QemuDefault, 9.0)]
        {
            let figures = Figures { bytes_per_sec: rate, ..Figures::default() };
            report.add(Sample::new("ext4", CASES[0], who, 1, figures));
        }
        let svg = draw(&report);
        assert!(svg.contains("a &lt;machine&gt;") && svg.contains(">ext4, seq-write<"), "{svg}");
        assert!(svg.contains("width=\"300.0\"") && svg.contains(">0.75<"), "{svg}");
        assert!(svg.contains("width=\"560.0\"") && svg.contains(">2.25<"), "{svg}");
        assert!(!svg.contains("host file"), "the limit is a line");
    }
}
