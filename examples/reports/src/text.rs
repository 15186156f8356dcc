//! Lines of text and names.

/// A list item in lines of at most 110 characters.
pub fn wrapped(sentence: &str) -> String {
    let (mut text, mut length) = ("-".to_owned(), 1);
    for word in sentence.split_whitespace() {
        let size = word.chars().count() + 1;
        if length + size > 110 {
            text.push_str("\n ");
            length = 1;
        }
        text.push(' ');
        text.push_str(word);
        length += size;
    }
    text.push('\n');
    text
}

/// A name without its middle if it is too long: names often differ at the end.
pub fn shortened(name: &str, width: usize) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= width {
        return name.to_owned();
    }
    let kept = width.saturating_sub(1);
    let (first, last) = (&letters[..kept / 3], &letters[letters.len() - (kept - kept / 3)..]);
    first.iter().chain(&['…']).chain(last).collect()
}
