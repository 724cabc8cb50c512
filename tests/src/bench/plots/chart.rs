//! A plot as SVG.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::data::{Line, Plot, Scale};

/// Pixels.
const SIZE: (u32, u32) = (760, 440);
/// Colours that are told apart also by those who see few (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
/// Room above the highest point, for the legend, by scale.
const ROOM: f64 = 1.5;
const LOGARITHMIC_ROOM: f64 = 12.0;
/// Room beside the outermost points.
const EDGE: f64 = 1.02;
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws it into a file.
pub(super) fn draw(plot: &Plot, path: &Path) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let (across, up) = ranges(&plot.lines, plot.scale);
    area.fill(&WHITE)
        .map_err(|error| anyhow!("{error}"))
        .and_then(|()| match plot.scale {
            Scale::Linear => draw_on(&area, plot, across, up),
            Scale::Logarithmic => draw_on(&area, plot, across, up.log_scale()),
        })
        .and_then(|()| area.present().map_err(|error| anyhow!("{error}")))
        .map_err(|error| anyhow!("drawing {}: {error}", path.display()))
}

/// What of each axis is shown.
fn ranges(lines: &[Line], scale: Scale) -> (Range<f64>, Range<f64>) {
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    let up = match scale {
        Scale::Linear => 0.0..top * ROOM,
        Scale::Logarithmic => {
            let bottom = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
            bottom / EDGE..top * LOGARITHMIC_ROOM
        }
    };
    (0.0..right * EDGE, up)
}

/// A number as short as it can be, without what floating point adds.
fn short(value: f64) -> String {
    ((value * 1e3).round() / 1e3).to_string()
}

fn draw_on<Y>(area: &Area<'_>, plot: &Plot, across: Range<f64>, up: Y) -> Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let problem = |error: DrawingAreaErrorKind<_>| anyhow!("{error}");
    let mut chart = ChartBuilder::on(area)
        .caption(plot.title, (FONT, 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(across, up)
        .map_err(problem)?;
    chart
        .configure_mesh()
        .x_desc(plot.across)
        .y_desc(plot.up)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .light_line_style(TRANSPARENT)
        .label_style((FONT, 12))
        .axis_desc_style((FONT, 13))
        .draw()
        .map_err(problem)?;
    for (line, colour) in plot.lines.iter().zip(COLOURS.iter().cycle()) {
        let points = || line.points.iter().copied();
        chart
            .draw_series(LineSeries::new(points(), colour.stroke_width(2)))
            .map_err(problem)?
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled()))).map_err(problem)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .label_font((FONT, 12))
        .draw()
        .map_err(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_becomes_a_file_with_its_words() {
        let plot = Plot {
            title: "A title",
            across: "time",
            up: "size",
            scale: Scale::Logarithmic,
            lines: vec![Line { name: "xferry".into(), points: vec![(0.0, 0.01), (5.0, 900.0)] }],
        };
        let path = std::env::temp_dir().join(format!("xferry-plot-{}.svg", std::process::id()));
        for scale in [Scale::Logarithmic, Scale::Linear] {
            draw(&Plot { scale, ..plot.clone() }, &path).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            for word in ["<svg", "A title", "time", "size", "xferry", "<polyline"] {
                assert!(text.contains(word), "{word}");
            }
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([short(1000.0), short(0.1 + 0.2), short(2.5)], ["1000", "0.3", "2.5"]);
    }

    #[test]
    fn all_points_are_shown() {
        let lines = [Line { name: String::new(), points: vec![(1.0, 4.0), (9.0, 100.0)] }];
        let (across, up) = ranges(&lines, Scale::Logarithmic);
        assert!(across.contains(&9.0) && up.contains(&4.0) && up.contains(&100.0));
        assert!(ranges(&lines, Scale::Linear).1.start.abs() < f64::EPSILON);
    }
}
