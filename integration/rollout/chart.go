package rollout

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Sizes in points; 1.33 pixels each. The whole is as wide as a README's text on GitHub.
const (
	chartWidth vg.Length = 640
	rowHeight  vg.Length = 24
	headHeight vg.Length = 24
	barHeight  vg.Length = 14
	fontSize   vg.Length = 10
	margin     vg.Length = 6
	// labelRoom is the share of a panel that is left for the figures behind the longest bar.
	labelRoom = 0.75
)

// Both stand out on white and on black.
var (
	oursColor   = color.RGBA{R: 0x1a, G: 0x9f, B: 0x63, A: 255}
	othersColor = color.RGBA{R: 0xc9, G: 0x6a, B: 0x32, A: 255}
	whisker     = color.RGBA{R: 0x80, G: 0x80, B: 0x80, A: 255}
)

// style gives text the colour of what it is read on: the chart has no background. Black text carries no colour of its own in
// the SVG. The fonts have the widths of the one that the layout is made for, which is seldom installed where a README is read.
const style = `<style>text{fill:#1f2328;font-family:Arial,Helvetica,"Liberation Sans",sans-serif!important}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}}</style>
`

// bar is one way's row in one panel. Lengths are from 0 to 1.
type bar struct {
	length, whisker float64
	label           string
	color           color.Color
}

// SVG writes the chart: failed requests on the left, the time beyond the longest request on the right.
func (r Report) SVG(w io.Writer) error {
	n := len(r.Results)
	names, failed, beyond := make([]string, n), make([]bar, n), make([]bar, n)
	var mostFailed, longest float64
	for _, res := range r.Results {
		_, worst := res.Beyond()
		mostFailed, longest = max(mostFailed, logarithm(res.Counts().Failed)), max(longest, worst.Seconds())
	}
	for i, res := range r.Results {
		row := n - 1 - i // rows count from the bottom
		c := color.Color(othersColor)
		if res.Way.Ours {
			c = oursColor
		}
		median, worst := res.Beyond()
		lost := res.Counts().Failed
		names[row] = res.Way.Title
		failed[row] = bar{length: ratio(logarithm(lost), mostFailed), label: fmt.Sprint(lost), color: c}
		beyond[row] = bar{
			length: ratio(median.Seconds(), longest), whisker: ratio(worst.Seconds(), longest), color: c,
			label: fmt.Sprintf("%.1f s, worst %.1f s", median.Seconds(), worst.Seconds()),
		}
		if lost > 0 && worst == 0 {
			beyond[row].label = "none: cut off"
		}
	}
	left, err := panel("Failed requests (logarithmic bars)", failed)
	if err != nil {
		return err
	}
	left.NominalY(names...)
	left.Y.Tick.Label.Font = chartFont()
	left.Y.LineStyle.Width, left.Y.Tick.Length = 0, 0
	right, err := panel("Stop time beyond the longest request", beyond)
	if err != nil {
		return err
	}
	right.HideY()
	canvas := vgsvg.New(chartWidth, headHeight+vg.Length(n)*rowHeight+2*margin)
	area := draw.Crop(draw.New(canvas), margin, -margin, margin, -margin)
	const split = 0.6 // the left one has the names
	middle := area.Min.X + split*(area.Max.X-area.Min.X)
	left.Draw(draw.Crop(area, 0, middle-area.Max.X, 0, 0))
	right.Draw(draw.Crop(area, middle-area.Min.X+fontSize, 0, 0, 0))
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return err
	}
	_, err = w.Write(bytes.Replace(b.Bytes(), []byte("<g transform"), []byte(style+"<g transform"), 1))
	return err
}

// panel draws bars from 0 to 1, each with its label behind it.
func panel(title string, bars []bar) (*plot.Plot, error) {
	p := plot.New()
	p.BackgroundColor = nil
	p.Title.Text, p.Title.TextStyle.Font = title, chartFont()
	p.HideX()
	labels := plotter.XYLabels{}
	for i, b := range bars {
		chart, err := plotter.NewBarChart(plotter.Values{b.length}, barHeight)
		if err != nil {
			return nil, err
		}
		chart.Horizontal, chart.XMin, chart.Color, chart.LineStyle.Width = true, float64(i), b.color, 0
		p.Add(chart)
		if b.whisker > b.length {
			line, err := plotter.NewLine(plotter.XYs{{X: b.length, Y: float64(i)}, {X: b.whisker, Y: float64(i)}})
			if err != nil {
				return nil, err
			}
			line.Color, line.Width = whisker, vg.Points(1.5)
			p.Add(line)
		}
		labels.XYs = append(labels.XYs, plotter.XY{X: max(b.length, b.whisker), Y: float64(i)})
		labels.Labels = append(labels.Labels, b.label)
	}
	l, err := plotter.NewLabels(labels)
	if err != nil {
		return nil, err
	}
	for i := range l.TextStyle {
		l.TextStyle[i].Font, l.TextStyle[i].YAlign = chartFont(), text.YCenter
	}
	l.Offset = vg.Point{X: 4, Y: 1.5} // off the bar, and what the font's descent takes
	p.Add(l)
	p.X.Min, p.X.Max = 0, 1+labelRoom
	p.Y.Min, p.Y.Max = -0.5, float64(len(bars))-0.5
	return p, nil
}

func chartFont() font.Font { return font.Font{Typeface: "Liberation", Variant: "Sans", Size: fontSize} }

func logarithm(n int64) float64 { return math.Log10(1 + float64(n)) }

// ratio of what may be none of nothing.
func ratio(part, of float64) float64 {
	if of == 0 {
		return 0
	}
	return part / of
}
