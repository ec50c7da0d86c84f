//! Figures: pictures side by side under labels, with curves below.

use plotters::chart::ChartBuilder;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::PathElement;
use plotters::prelude::{BitMapBackend, LineSeries};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{BLACK, Color, FontStyle, RGBColor, TextStyle, WHITE, register_font};

use crate::image::Rgb;
use crate::{Error, Result};

/// One row of pictures, one per column.
pub struct Row {
    /// What stands above it.
    pub label: String,
    /// All of one size, throughout the figure.
    pub pictures: Vec<Rgb>,
}

/// One line of the plot.
pub struct Curve {
    /// What the legend says.
    pub label: String,
    /// `(x, y)`, both finite.
    pub points: Vec<(f64, f64)>,
}

/// What a figure shows: pictures, curves, or both.
pub struct Figure {
    /// Headings of the columns.
    pub columns: Vec<String>,
    /// The pictures.
    pub rows: Vec<Row>,
    /// The plot below them.
    pub curves: Vec<Curve>,
    /// Names of the plot's axes.
    pub axes: (String, String),
}

const FONT: &str = "sans-serif";
const MARGIN: u32 = 12;
const GAP: u32 = 8;
/// Height of a line of text, and of its letters.
const LINE: u32 = 24;
const TEXT: u32 = 17;
const PLOT_HEIGHT: u32 = 300;
/// Length of a curve's line in the legend.
const STROKE: u32 = 24;
/// Smaller pictures are enlarged by a whole factor to about this width.
const CELL: u32 = 160;
/// A plot that is narrower cannot be read.
const LEAST_WIDTH: u32 = 560;
/// Colours that also people with a colour-vision deficiency can tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

impl Figure {
    /// Draws it. Fails when a row has not one picture per column, when pictures differ in size, and when there is nothing
    /// to draw.
    pub fn draw(&self) -> Result<Rgb> {
        let (width, height) = self.picture_size()?;
        let scale = (CELL / width.max(1)).max(1);
        let (cell_width, cell_height) = (width * scale, height * scale);
        let (columns, rows) = (self.columns.len() as u32, self.rows.len() as u32);
        let row_height = cell_height.saturating_add(LINE + GAP);
        let headings = if self.columns.is_empty() { 0 } else { LINE };
        let plot_top = rows.saturating_mul(row_height).saturating_add(MARGIN + headings);
        // The legend stands above the plot, a line for each curve, where it covers nothing.
        let legend = u32::try_from(self.curves.len()).unwrap_or(u32::MAX).saturating_mul(LINE);
        let plot_height = if self.curves.is_empty() { 0 } else { PLOT_HEIGHT.saturating_add(legend) };
        let full_width = columns.saturating_mul(cell_width.saturating_add(GAP)).saturating_add(2 * MARGIN - GAP);
        let (full_width, full_height) =
            (full_width.max(LEAST_WIDTH), plot_top.saturating_add(plot_height).saturating_add(MARGIN));
        let mut figure = Rgb::filled(full_width, full_height, [255; 3])?;
        let left = |column: usize| MARGIN + column as u32 * (cell_width + GAP);
        let top = |row: usize| MARGIN + LINE + row as u32 * row_height;
        {
            register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
                .map_err(|_| failed("the built-in font cannot be read"))?;
            let area = BitMapBackend::with_buffer(&mut figure.pixels, (full_width, full_height)).into_drawing_area();
            for (column, label) in self.columns.iter().enumerate() {
                write(&area, label, (left(column) + cell_width / 2, MARGIN), HPos::Center, cell_width + GAP)?;
            }
            for (row, Row { label, .. }) in self.rows.iter().enumerate() {
                write(&area, label, (MARGIN, top(row)), HPos::Left, full_width - 2 * MARGIN)?;
            }
            if !self.curves.is_empty() {
                for (index, (curve, colour)) in self.coloured().enumerate() {
                    let y = plot_top + index as u32 * LINE;
                    let stroke =
                        vec![(MARGIN as i32, (y + LINE / 2) as i32), ((MARGIN + STROKE) as i32, (y + LINE / 2) as i32)];
                    area.draw(&PathElement::new(stroke, colour.stroke_width(3))).map_err(failed)?;
                    let left = MARGIN + STROKE + GAP;
                    write(&area, &curve.label, (left, y), HPos::Left, full_width - left - MARGIN)?;
                }
                self.plot(&area.margin(plot_top + legend, MARGIN, MARGIN, MARGIN)).map_err(failed)?;
            }
        }
        for (row, Row { pictures, .. }) in self.rows.iter().enumerate() {
            for (column, picture) in pictures.iter().enumerate() {
                figure.paste(picture, (left(column), top(row) + LINE), scale);
            }
        }
        Ok(figure)
    }

    fn picture_size(&self) -> Result<(u32, u32)> {
        let size = |picture: &Rgb| (picture.width, picture.height);
        let first = self.rows.iter().flat_map(|row| &row.pictures).next().map(size);
        let Some(first) = first else {
            let nothing = self.rows.is_empty() && self.curves.is_empty();
            return if nothing { Err(failed("there is nothing to draw")) } else { Ok((0, 0)) };
        };
        for Row { label, pictures } in &self.rows {
            if pictures.len() != self.columns.len() {
                let (found, expected) = (pictures.len(), self.columns.len());
                return Err(failed(format!("row `{label}` has {found} pictures for {expected} columns")));
            }
            if let Some(other) = pictures.iter().map(size).find(|other| *other != first) {
                return Err(failed(format!("pictures of {first:?} and {other:?} pixels side by side")));
            }
        }
        Ok(first)
    }

    fn plot(&self, area: &Area) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let (x, y) = (range(points().map(|p| p.0), 0.), range(points().map(|p| p.1), 0.06));
        let font = (FONT, TEXT);
        let mut chart = ChartBuilder::on(area)
            .margin(4)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
        let (x_name, y_name) = &self.axes;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .x_desc(x_name)
            .y_desc(y_name)
            .label_style(font)
            .axis_desc_style(font)
            .draw()?;
        for (curve, colour) in self.coloured() {
            chart.draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?;
        }
        area.present()?;
        Ok(())
    }

    fn coloured(&self) -> impl Iterator<Item = (&Curve, &RGBColor)> {
        self.curves.iter().zip(COLOURS.iter().cycle())
    }
}

/// A tick's number without the digits that rounding leaves: 5, 0.25.
fn tick(value: &f64) -> String {
    // Adding zero makes 0 of -0.
    format!("{}", (value * 1e6).round() / 1e6 + 0.)
}

/// Least and greatest of the values, widened by a share at both ends so that a line does not lie on the frame.
fn range(values: impl Iterator<Item = f64>, share: f64) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    let spread = if high > low { (high - low) * share } else { 0.5 };
    if low <= high { (low - spread, high + spread) } else { (0., 1.) }
}

/// One line of text whose top is at `y`; cut with an ellipsis where it is wider than `width`.
fn write(area: &Area, text: &str, (x, y): (u32, u32), anchor: HPos, width: u32) -> Result<()> {
    let style = TextStyle::from((FONT, TEXT)).color(&BLACK).pos(Pos::new(anchor, VPos::Top));
    let wide = |text: &str| -> Result<bool> { Ok(area.estimate_text_size(text, &style).map_err(failed)?.0 > width) };
    let mut shown = text.to_owned();
    while wide(&shown)? && shown.chars().count() > 2 {
        shown.truncate(shown.trim_end_matches('…').char_indices().next_back().map_or(0, |(last, _)| last));
        shown.push('…');
    }
    area.draw_text(&shown, &style, (x as i32, y as i32 + 2)).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Request(format!("the figure cannot be drawn: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(colour: [u8; 3]) -> Rgb {
        Rgb::filled(64, 32, colour).unwrap()
    }

    fn figure() -> Figure {
        let row = |label: &str| Row { label: label.into(), pictures: vec![picture([200, 0, 0]), picture([0, 0, 200])] };
        let curve = |label: &str, slope: f64| Curve {
            label: label.into(),
            points: (0..5).map(|i| (f64::from(i), slope * f64::from(i))).collect(),
        };
        Figure {
            columns: vec!["without".into(), "with".into()],
            rows: vec![row("naïve ☃ circle"), row(&"long ".repeat(100))],
            curves: vec![curve("first", 0.1), curve("second", -0.1)],
            axes: ("step".into(), "score".into()),
        }
    }

    #[test]
    fn pictures_lie_enlarged_in_their_cells() {
        let drawn = figure().draw().unwrap();
        // 64 pixels are enlarged twice; the first row's pictures begin below the headings and its label.
        let (y, second) = (MARGIN + 2 * LINE, MARGIN + 128 + GAP);
        for (x, colour) in [(MARGIN, [200, 0, 0]), (MARGIN + 127, [200, 0, 0]), (second, [0, 0, 200])] {
            assert_eq!((drawn.at(x, y), drawn.at(x, y + 63)), (colour, colour));
        }
        assert_eq!(drawn.at(MARGIN + 128, y), [255; 3]);
        assert_eq!(drawn.at(MARGIN, y + 64), [255; 3]);
        assert_eq!(drawn.width, LEAST_WIDTH);
    }

    #[test]
    fn labels_and_curves_leave_ink() {
        let ink = |figure: &Figure| figure.draw().unwrap().pixels.chunks(3).filter(|p| *p != [255; 3]).count();
        let (whole, mut blank) = (figure(), figure());
        blank.rows[0].label.clear();
        assert!(ink(&blank) < ink(&whole));
        let mut fewer = figure();
        fewer.curves.pop();
        assert!(ink(&fewer) < ink(&whole));
        // Each in a colour of its own.
        let drawn = whole.draw().unwrap();
        let has = |colour: RGBColor| drawn.pixels.chunks(3).any(|p| p == [colour.0, colour.1, colour.2]);
        assert!(has(COLOURS[0]) && has(COLOURS[1]) && !has(COLOURS[2]));
    }

    #[test]
    fn a_constant_or_empty_curve_is_drawn() {
        let mut flat = figure();
        flat.curves[0].points.iter_mut().for_each(|point| point.1 = 0.2);
        flat.curves.truncate(1);
        flat.draw().unwrap();
        flat.curves[0].points.clear();
        flat.draw().unwrap();
        flat.curves.clear();
        assert!(flat.draw().unwrap().height < figure().draw().unwrap().height);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let mut short = figure();
        short.rows[1].pictures.pop();
        assert!(short.draw().err().unwrap().to_string().contains("1 pictures for 2 columns"));
        let mut mixed = figure();
        mixed.rows[1].pictures[0] = Rgb::filled(8, 8, [0; 3]).unwrap();
        assert!(mixed.draw().err().unwrap().to_string().contains("(64, 32) and (8, 8)"));
        let empty = Figure { rows: Vec::new(), curves: Vec::new(), ..figure() };
        assert!(empty.draw().err().unwrap().to_string().contains("nothing to draw"));
    }
}
