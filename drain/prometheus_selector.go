package drain

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// selector is PromQL's: a metric's name, and matchers of its labels.
type selector struct {
	text, name string
	// words of the name, to find similar ones.
	words    []string
	matchers []matcher
}

type matcher struct {
	label, value string
	// pattern is set for =~ and !~, and matches whole values.
	pattern *regexp.Regexp
	not     bool
}

func (m *matcher) match(value string) bool {
	if m.pattern != nil {
		return m.pattern.MatchString(value) != m.not
	}
	return (value == m.value) != m.not
}

const wantSelector = `must be a gauge's name, with matchers of its labels if need be, as in name{label="value",other!~"a|b"}`

// parseSelector reads NAME or NAME{LABEL OP "VALUE",...}; blanks may stand between.
func parseSelector(text string) (selector, error) {
	c := cursor{text}
	c.blanks()
	s := selector{text: strings.TrimSpace(text), name: c.name(true)}
	if s.name == "" {
		return s, errors.New(wantSelector)
	}
	s.words = strings.FieldsFunc(s.name, betweenWords)
	c.blanks()
	if !c.take("{") {
		if c.rest != "" {
			return s, fmt.Errorf("%q follows the name: %s", shorten(c.rest), wantSelector)
		}
		return s, nil
	}
	for {
		if c.blanks(); c.take("}") {
			break
		}
		m, err := c.matcher()
		if err != nil {
			return s, err
		}
		s.matchers = append(s.matchers, m)
		if c.blanks(); !c.take(",") && !strings.HasPrefix(c.rest, "}") {
			return s, fmt.Errorf("neither , nor } after the value of %s: %s", m.label, wantSelector)
		}
	}
	if c.blanks(); c.rest != "" {
		return s, fmt.Errorf("%q follows the matchers: %s", shorten(c.rest), wantSelector)
	}
	return s, nil
}

// cursor reads a text from its start.
type cursor struct{ rest string }

func (c *cursor) blanks() { c.rest = strings.TrimLeft(c.rest, " \t") }

func (c *cursor) take(token string) bool {
	rest, ok := strings.CutPrefix(c.rest, token)
	c.rest = rest
	return ok
}

// name is that of a label or, with colons, of a metric; empty when there is none.
func (c *cursor) name(colons bool) string {
	end := 0
	for end < len(c.rest) {
		b := c.rest[end]
		if b == '_' || 'a' <= b|0x20 && b|0x20 <= 'z' || end > 0 && '0' <= b && b <= '9' || colons && b == ':' {
			end++
			continue
		}
		break
	}
	name := c.rest[:end]
	c.rest = c.rest[end:]
	return name
}

// label is a label's name; one with characters that names could not have before Prometheus 3 is quoted.
func (c *cursor) label() (string, error) {
	if strings.HasPrefix(c.rest, `"`) {
		name, err := c.value()
		if err != nil {
			return "", fmt.Errorf("a label's name %w", err)
		}
		return name, nil
	}
	if name := c.name(false); name != "" {
		return name, nil
	}
	return "", fmt.Errorf("no label's name before %q", shorten(c.rest))
}

// value is a label's value as the exposition format quotes it: only \\, \" and \n are escapes.
func (c *cursor) value() (string, error) {
	if !c.take(`"`) {
		return "", errors.New("is not quoted")
	}
	end := strings.IndexAny(c.rest, `"\`)
	if end >= 0 && c.rest[end] == '"' {
		value := c.rest[:end]
		c.rest = c.rest[end+1:]
		return value, nil
	}
	var value strings.Builder
	for i := 0; i < len(c.rest); i++ {
		switch b := c.rest[i]; b {
		case '"':
			c.rest = c.rest[i+1:]
			return value.String(), nil
		case '\\':
			if i++; i == len(c.rest) {
				return "", errors.New("has no end")
			}
			switch b := c.rest[i]; b {
			case '\\', '"':
				value.WriteByte(b)
			case 'n':
				value.WriteByte('\n')
			default:
				return "", fmt.Errorf("has the escape \\%c, must be \\\\, \\\" or \\n", b)
			}
		default:
			value.WriteByte(b)
		}
	}
	return "", errors.New("has no end")
}

func (c *cursor) matcher() (matcher, error) {
	label, err := c.label()
	if err != nil {
		return matcher{}, fmt.Errorf("%w: %s", err, wantSelector)
	}
	m := matcher{label: label}
	if label == "__name__" {
		return m, fmt.Errorf("the name goes before the braces: %s", wantSelector)
	}
	c.blanks()
	var regex bool
	switch {
	case c.take("=~"):
		regex = true
	case c.take("!~"):
		regex, m.not = true, true
	case c.take("!="):
		m.not = true
	case c.take("="):
	default:
		return m, fmt.Errorf("no =, !=, =~ or !~ after %s: %s", label, wantSelector)
	}
	c.blanks()
	if m.value, err = c.literal(); err != nil {
		return m, fmt.Errorf("the value of %s %w", label, err)
	}
	if regex {
		if m.pattern, err = regexp.Compile(`^(?s:` + m.value + `)$`); err != nil {
			return m, fmt.Errorf("the value of %s is no regular expression: %w", label, err)
		}
	}
	return m, nil
}

// literal is a string of PromQL: Go's escapes in single or double quotes, none in backticks.
func (c *cursor) literal() (string, error) {
	quoted, err := strconv.QuotedPrefix(c.rest)
	if strings.HasPrefix(c.rest, "'") {
		// Go has no such strings.
		end, closed := 1, false
		for ; end < len(c.rest) && !closed; end++ {
			switch c.rest[end] {
			case '\\':
				end++
			case '\'':
				closed = true
			}
		}
		if !closed {
			return "", errors.New("has no end")
		}
		inner := strings.NewReplacer(`\\`, `\\`, `\'`, `'`, `"`, `\"`).Replace(c.rest[1 : end-1])
		value, err := strconv.Unquote(`"` + inner + `"`)
		if err != nil {
			return "", errors.New("has an escape that PromQL does not know")
		}
		c.rest = c.rest[end:]
		return value, nil
	}
	if err != nil {
		return "", errors.New("must be in quotes, closed, with escapes that PromQL knows")
	}
	value, err := strconv.Unquote(quoted)
	if err != nil {
		return "", fmt.Errorf("cannot be unquoted: %w", err)
	}
	c.rest = c.rest[len(quoted):]
	return value, nil
}
