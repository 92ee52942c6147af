// Renders a chart where Helm is missing, with the libraries that Helm renders with (text/template, sprig, sigs.k8s.io/yaml;
// in Debian: golang-go golang-github-masterminds-sprig-dev golang-k8s-sigs-yaml-dev).
// render_chart CHART VALUES.yaml: values.yaml of the chart, overlaid by VALUES.yaml; manifests on stdout.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"sigs.k8s.io/yaml"
)

type files struct{ folder string }

// Get is what templates call as .Files.Get.
func (f files) Get(name string) string {
	raw, err := os.ReadFile(filepath.Join(f.folder, name))
	if err != nil {
		return ""
	}
	return string(raw)
}

func main() {
	chart := os.Args[1]
	values := read(filepath.Join(chart, "values.yaml"))
	merge(values, read(os.Args[2]))
	about := read(filepath.Join(chart, "Chart.yaml"))
	root := template.New("chart").Option("missingkey=zero").Funcs(sprig.TxtFuncMap())
	root.Funcs(template.FuncMap{
		"include": func(name string, data interface{}) (string, error) {
			var out bytes.Buffer
			err := root.ExecuteTemplate(&out, name, data)
			return out.String(), err
		},
		"toYaml": func(value interface{}) string {
			raw, err := yaml.Marshal(value)
			die(err)
			return strings.TrimSuffix(string(raw), "\n")
		},
		"toJson": func(value interface{}) string {
			raw, err := json.Marshal(value)
			die(err)
			return string(raw)
		},
	})
	base := about["name"].(string) + "/templates"
	paths, err := filepath.Glob(filepath.Join(chart, "templates", "*"))
	die(err)
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		die(err)
		_, err = root.New(base + "/" + filepath.Base(path)).Parse(string(raw))
		die(err)
	}
	data := map[string]interface{}{
		"Values":   values,
		"Chart":    map[string]interface{}{"Name": about["name"], "Version": about["version"], "AppVersion": about["appVersion"]},
		"Release":  map[string]interface{}{"Name": "site", "Namespace": "edge", "Service": "Helm"},
		"Template": map[string]interface{}{"BasePath": base},
		"Files":    files{chart},
	}
	for _, path := range paths {
		if strings.HasPrefix(filepath.Base(path), "_") {
			continue
		}
		var out bytes.Buffer
		die(root.ExecuteTemplate(&out, base+"/"+filepath.Base(path), data))
		text := strings.ReplaceAll(out.String(), "<no value>", "")
		if strings.HasSuffix(path, ".txt") {
			fmt.Fprintln(os.Stderr, text)
		} else if strings.TrimSpace(text) != "" {
			fmt.Printf("---\n# Source: %s\n%s\n", path, text)
		}
	}
}

func read(path string) map[string]interface{} {
	raw, err := os.ReadFile(path)
	die(err)
	value := map[string]interface{}{}
	die(yaml.Unmarshal(raw, &value))
	return value
}

func merge(into, from map[string]interface{}) {
	for key, value := range from {
		inner, isMap := value.(map[string]interface{})
		known, wasMap := into[key].(map[string]interface{})
		if isMap && wasMap {
			merge(known, inner)
		} else {
			into[key] = value
		}
	}
}

func die(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}
