//! Names beside marks, where they cover nothing.

/// A rectangle in pixels: left, top, right, bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Left.
    pub left: i32,
    /// Top.
    pub top: i32,
    /// Right.
    pub right: i32,
    /// Bottom.
    pub bottom: i32,
}

impl Frame {
    /// A square around a mark.
    pub fn around((x, y): (i32, i32), reach: i32) -> Self {
        Self { left: x - reach, top: y - reach, right: x + reach, bottom: y + reach }
    }

    fn overlap(&self, other: &Self) -> i64 {
        let width = (self.right.min(other.right) - self.left.max(other.left)).max(0);
        let height = (self.bottom.min(other.bottom) - self.top.max(other.top)).max(0);
        i64::from(width) * i64::from(height)
    }

    /// The area that lies outside of another.
    fn outside(&self, other: &Self) -> i64 {
        i64::from(self.right - self.left) * i64::from(self.bottom - self.top) - self.overlap(other)
    }
}

/// The width of a text, about.
pub fn width(text: &str, size: i32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * 0.56).ceil() as i32
}

/// Left upper corners of the names of marks, in turn, each inside `frame` and off `taken`, as far
/// as that is possible.
pub fn place(
    marks: &[((i32, i32), String)],
    size: i32,
    frame: &Frame,
    taken: &[Frame],
) -> Vec<(i32, i32)> {
    let mut taken = taken.to_vec();
    let mut places = Vec::with_capacity(marks.len());
    for ((x, y), name) in marks {
        let (width, height) = (width(name, size), size + 2);
        let middle = y - height / 2;
        let mut corners = vec![
            (x + 9, middle),
            (x - 9 - width, middle),
            (x - width / 2, y - 8 - height),
            (x - width / 2, y + 8),
        ];
        for step in 1..=3 {
            let shift = step * height * 3 / 4;
            for left in [x + 9, x - 9 - width] {
                corners.extend([(left, middle - shift), (left, middle + shift)]);
            }
        }
        let at = |(left, top): (i32, i32)| Frame {
            left,
            top,
            right: left + width,
            bottom: top + height,
        };
        let cost = |corner: &(i32, i32)| {
            let at = at(*corner);
            10 * at.outside(frame) + taken.iter().map(|other| at.overlap(other)).sum::<i64>()
        };
        let best = corners.iter().min_by_key(|corner| cost(corner)).copied().unwrap_or((*x, *y));
        taken.push(at(best));
        places.push(best);
    }
    places
}
